"""Pack images and conversations into tar shards: ``movekd shards pack``.

    pack_llava    LLaVA's JSON and its image folder -> shards, index, names, conversations
    pack_folder   a folder of images                -> shards, index, names

Each distinct image is stored once, in order of first appearance. The same input gives the same
bytes. Only a few images are in memory at a time. An unusable image is reported, not raised.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from movekd.corpus.conversations import load_conversations
from movekd.corpus.image_source import (
    IMAGE_EXTENSIONS,
    ImageSource,
    RejectedImage,
    examine_images,
    printable,
    require_folder,
)
from movekd.corpus.report import PackReport
from movekd.corpus.writer import CorpusBuilder, build_corpus
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

    An entry is dropped if one of its images cannot be used, or if its text has more ``<image>``
    than it has images. A missing ``<image>`` is put before the first question, as in LLaVA's own
    files. Both are reported.

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
        ConfigError: a LLaVA file is missing or malformed.
        CorpusError: ``out_dir`` holds another corpus or cannot be written, or no image is usable.
    """
    require_folder(image_dir)
    conversations = [entry for path in json_paths for entry in load_conversations(path)]
    with build_corpus(out_dir, overwrite, max_shard_bytes, force=force) as builder:
        matched = (builder.match_placeholders(entry) for entry in conversations)
        entries = [entry for entry in matched if entry is not None]
        names = dict.fromkeys(name for entry in entries for name in entry.images)
        rejected = _pack_images(builder, image_dir, names, num_workers, progress)
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

    A file is an image if its extension says so. Arguments and errors as in ``pack_llava``.
    """
    require_folder(image_dir)
    found = (path for path in image_dir.rglob("*") if not path.is_dir())
    names = sorted(path.relative_to(image_dir).as_posix() for path in found)
    images = [name for name in names if PurePosixPath(name).suffix[1:].lower() in IMAGE_EXTENSIONS]
    with build_corpus(out_dir, overwrite, max_shard_bytes, force=force) as builder:
        rejected = _pack_images(builder, image_dir, images, num_workers, progress)
        for name, rejection in rejected.items():
            builder.note(rejection.kind, printable(name), rejection.reason)
    return builder.report()


def _pack_images(
    builder: CorpusBuilder,
    image_dir: Path,
    names: Collection[str],
    num_workers: int,
    progress: Progress | None,
) -> dict[str, RejectedImage]:
    """Write image files to shards; return those that cannot be used, by name."""
    rejected: dict[str, RejectedImage] = {}
    sources = (ImageSource([name], image_dir / name) for name in names)
    for done, found in enumerate(examine_images(sources, num_workers)):
        if isinstance(found, RejectedImage):
            rejected[found.source.names[-1]] = found
        else:
            builder.add_image(found)
        if progress is not None:
            progress(done + 1, len(names))
    return rejected
