"""Pack images and conversations into tar shards: ``movekd shards pack``.

    pack_llava    LLaVA's JSON and its image folder -> shards, index, names, conversations
    pack_folder   a folder of images                -> shards, index, names

Each distinct image is stored once, in order of first appearance. The same input gives the same
bytes. Only a few images are in memory at a time. An unusable image is reported, not raised.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from movekd.corpus.conversations import Change, Conversation, read_entries
from movekd.corpus.folder import list_folder, require_folder
from movekd.corpus.image_source import ImageSource, RejectedImage, examine_images
from movekd.corpus.media import IMAGE_SUFFIXES, suffix, unknown_media
from movekd.corpus.report import PackReport, ProblemKind, Unit
from movekd.corpus.writer import CorpusBuilder, build_corpus
from movekd.errors import ConfigError
from movekd.threads import num_cpus

DEFAULT_SHARD_BYTES = 512 * 2**20
DEFAULT_WORKERS = min(8, num_cpus())
"""Threads that decode images: one per core, at most 8."""

Progress = Callable[[int, int], None]
"""Called with (done, total): images of a pack, tars of an existing WebDataset."""


def pack_llava(
    json_paths: Sequence[Path],
    image_dir: Path,
    out_dir: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the images that LLaVA files name, and the conversations that can be used.

    An entry is dropped if it is malformed, if one of its images cannot be used, if its text has
    more ``<image>`` than it has images, or if it has no answer. A missing ``<image>`` is put before
    the first question, as in LLaVA's own files. All of it is reported.

    Args:
        json_paths: LLaVA's files, .json or .jsonl.
        image_dir: the folder that the image paths are relative to.
        out_dir: the corpus folder; created if missing.
        max_shard_bytes: largest tar; a larger image gets its own.
        num_workers: threads that decode images; the result does not depend on it.
        overwrite: replace another corpus in ``out_dir``, as far as movekd wrote it.
        force: replace files that movekd cannot prove to be its own, too.
        progress: receives how many images are done.

    Raises:
        ConfigError: a LLaVA file is missing or is no JSON array.
        CorpusError: ``out_dir`` holds another corpus or cannot be written, or no image is usable.
    """
    require_folder(image_dir)
    with build_corpus(out_dir, overwrite, max_shard_bytes, force=force) as builder:
        entries = [entry for path in json_paths for entry in _read_llava(builder, path)]
        names = dict.fromkeys(name for entry in entries for name in entry.images)
        sources = (ImageSource([name], image_dir / name) for name in names)
        rejected = _pack_images(builder, "names", sources, len(names), num_workers, progress)
        for name, rejection in rejected.items():
            reason = f"{rejection.kind.replace('_', ' ')}: {rejection.reason}"
            builder.tally.leave_out("names", "rejected_names", name, reason)
        for entry in entries:
            builder.keep_or_drop(entry, rejected)
        return builder.report()


def pack_folder(
    image_dir: Path,
    out_dir: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack every image below a folder, in the order of the paths, which become the names.

    The bytes of a file tell whether it is an image, as for a file that LLaVA's JSON names. Links to
    folders are not followed. Arguments and errors as in ``pack_llava``.
    """
    require_folder(image_dir)
    found = list_folder(image_dir, ours=out_dir)
    with build_corpus(out_dir, overwrite, max_shard_bytes, force=force) as builder:
        builder.tally.find("files", len(found.skipped))
        for name, reason in found.skipped:
            builder.tally.leave_out("files", "skipped_folders", name, reason)
        sources = (
            ImageSource([name], image_dir / name, other=_kind_of_other_file(name))
            for name in found.files
        )
        number = len(found.files)
        rejected = _pack_images(builder, "files", sources, number, num_workers, progress)
        for name, rejection in rejected.items():
            builder.tally.leave_out("files", rejection.kind, name, rejection.reason)
        return builder.report()


def _read_llava(builder: CorpusBuilder, path: Path) -> Iterator[Conversation]:
    """Yield the conversations of a file that can be used so far; report the others."""
    for raw in read_entries(path):
        builder.tally.find("entries")
        changes: list[tuple[Change, str]] = []
        try:
            entry = raw.parse(changes)
        except ConfigError as error:
            is_media = isinstance(raw.value, dict) and bool(unknown_media(raw.value))
            kind: ProblemKind = "unknown_media" if is_media else "malformed_entries"
            builder.tally.leave_out("entries", kind, raw.id, str(error))
            continue
        for change, reason in changes:
            builder.note(change, entry.id, reason)
        matched = builder.match_placeholders(entry)
        if matched is not None:
            yield matched


def _kind_of_other_file(name: str) -> ProblemKind:
    """Return how a file is reported whose bytes are no image: by what its name promises."""
    return "unreadable_images" if suffix(name) in IMAGE_SUFFIXES else "not_images"


def _pack_images(
    builder: CorpusBuilder,
    unit: Unit,
    sources: Iterable[ImageSource],
    number: int,
    num_workers: int,
    progress: Progress | None,
) -> dict[str, RejectedImage]:
    """Write image files to shards; return those that cannot be used, by name."""
    builder.tally.find(unit, number)
    rejected: dict[str, RejectedImage] = {}
    for done, found in enumerate(examine_images(sources, num_workers)):
        if isinstance(found, RejectedImage):
            rejected[found.source.names[-1]] = found
        else:
            builder.add_image(found)
            builder.tally.keep(unit)
        if progress is not None:
            progress(done + 1, number)
    return rejected
