"""Index existing WebDataset tars where they lie: ``movekd shards pack --webdataset``.

Input: a folder of uncompressed tars. Output: index, names and conversations beside them. The tars
are not changed.
"""

from pathlib import Path

from movekd.corpus.folder import list_folder, require_folder
from movekd.corpus.image_source import (
    HEAD_BYTES,
    ImageSource,
    RejectedImage,
    examine_images,
    is_image,
    refused_path,
)
from movekd.corpus.media import IMAGE_SUFFIXES, MEDIA_SUFFIXES, suffix
from movekd.corpus.pack import DEFAULT_WORKERS, Progress
from movekd.corpus.report import PackReport, ProblemKind
from movekd.corpus.sample_texts import collect_texts
from movekd.corpus.samples import Sample, group_samples
from movekd.corpus.tar import TarMember, read_member, read_members
from movekd.corpus.writer import CorpusBuilder, build_corpus
from movekd.errors import CorpusError
from movekd.files.reading import open_regular

_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def index_webdataset(
    shards_dir: Path,
    *,
    num_workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Index the images in the tars below a folder, and collect their conversations.

    An image gets two names: its sample key (``path/without/extension``) and its full member name.
    A .json member holds a LLaVA entry or a list of entries about the images of its sample. If the
    sample has several images, the entry's ``image`` says which ones, by their member or file names.
    A .txt member is a caption, and so is ``caption`` in a .json member without conversations.

    Args:
        shards_dir: folder of uncompressed tars; the index is written into it.
        num_workers: threads that decode images; the result does not depend on it.
        overwrite: replace another index.
        force: replace files that movekd cannot prove to be its own, too.
        progress: receives how many tars are done.

    Raises:
        CorpusError: no image is usable, another index exists, or the folder cannot be written.
    """
    require_folder(shards_dir)
    found = list_folder(shards_dir, ours=shards_dir)
    tars = [name for name in found.files if suffix(name) == "tar"]
    with build_corpus(shards_dir, overwrite, force=force) as builder:
        tally = builder.tally
        tally.find("files", len(found.skipped))
        for name, reason in found.skipped:
            tally.leave_out("files", "skipped_folders", name, reason)
        for name in found.files:
            if suffix(name) != "tar":
                _report_file(builder, shards_dir, name)
        indexer = _Indexer(builder, num_workers)
        for done, shard in enumerate(tars):
            indexer.index(shards_dir / shard, shard)
            if progress is not None:
                progress(done + 1, len(tars))
        return builder.report()


def _report_file(builder: CorpusBuilder, shards_dir: Path, name: str) -> None:
    """Report a file that is no tar, or a compressed one."""
    if name.lower().endswith(_COMPRESSED_TARS):
        builder.tally.find("shards")
        reason = "is compressed; unpack it to a plain .tar"
        builder.tally.leave_out("shards", "damaged_shards", name, reason)
        return
    kind: ProblemKind = "unused_files"
    reason = "it is no .tar"
    try:
        with open_regular(shards_dir / name) as file:
            if is_image(file.read(HEAD_BYTES)):
                kind, reason = "not_images", "it lies beside the tars, not in one; use --images"
    except OSError:
        kind, reason = "special_files", "it is no regular file that can be read"
    builder.tally.find("files")
    builder.tally.leave_out("files", kind, name, reason)


class _Indexer:
    """Indexes one tar after another; remembers the names, each of which must mean one image."""

    def __init__(self, builder: CorpusBuilder, num_workers: int) -> None:
        self._builder, self._tally = builder, builder.tally
        self._num_workers = num_workers
        self._shard_of: dict[str, str] = {}  # name of an image -> the tar that it is in

    def index(self, path: Path, shard: str) -> None:
        """Index the tar at ``path``, which is called ``shard``."""
        samples = [sample for sample in self._read(path, shard) if self._is_new(sample, shard)]
        names = {image.name: [image.name] for sample in samples for image in sample.images}
        self._shard_of.update(dict.fromkeys(names, shard))
        for sample in samples:
            if sample.images and sample.key not in self._shard_of:
                self._shard_of[sample.key] = shard
                names[sample.images[0].name].insert(0, sample.key)
        images = [image for sample in samples for image in sample.images]
        sources = [ImageSource(names[image.name], path, image) for image in images]
        rejected: dict[str, RejectedImage] = {}
        for source, found in zip(sources, examine_images(sources, self._num_workers), strict=True):
            if isinstance(found, RejectedImage):
                rejected.update((name, found) for name in source.names)
                self._leave_out(shard, source.names[-1], found.kind, found.reason)
            else:
                self._builder.add_image(found)
                self._tally.keep("members")
        for sample in samples:
            called = {image.name: image.name for image in sample.images}
            if len(called) == 1:
                called = {name: names[name][0] for name in called}
            collect_texts(self._builder, sample, path, shard, called, rejected)

    def _read(self, path: Path, shard: str) -> list[Sample]:
        """Return the samples of a tar; report what is in no sample."""
        images: list[TarMember] = []
        texts: list[TarMember] = []
        names: set[str] = set()
        self._tally.find("shards")
        try:
            for member in read_members(path):
                self._tally.find("members")
                name, kind = member.name, suffix(member.name)
                if reason := refused_path(name, "tar"):
                    self._leave_out(shard, name, "refused_paths", reason)
                elif member.refusal:
                    self._leave_out(shard, name, "special_files", member.refusal)
                elif name in names:
                    self._leave_out(shard, name, "duplicate_samples", f"twice in {shard}")
                elif kind in ("json", "txt"):
                    texts.append(member)
                elif kind in IMAGE_SUFFIXES or _holds_image(path, member):
                    images.append(member)
                elif kind in MEDIA_SUFFIXES:
                    self._leave_out(shard, name, "unknown_media", "only images are read")
                else:
                    reason = "it is neither image nor .json nor .txt"
                    self._leave_out(shard, name, "unused_members", reason)
                names.add(name)
        except CorpusError as error:
            reason = str(error).replace(str(path), "it", 1)
            self._tally.leave_out("shards", "damaged_shards", shard, reason)
        else:
            if images:
                self._tally.keep("shards")
            else:
                reason = "it holds no image"
                self._tally.leave_out("shards", "damaged_shards", shard, reason)
        return group_samples(images, texts)

    def _is_new(self, sample: Sample, shard: str) -> bool:
        """Return whether no earlier tar has an image of the same name; report the sample if so."""
        taken = [image.name for image in sample.images if image.name in self._shard_of]
        for member, kind, reason in sample.left_out:
            self._leave_out(shard, member.name, kind, reason)
        for member in sample.members if taken else []:
            reason = (
                f"{self._shard_of[taken[0]]} has an image {taken[0]} too, and a name must mean one "
                "image; rename the members of one tar, or put it into a folder and corpus by itself"
            )
            self._leave_out(shard, member.name, "duplicate_samples", reason)
        return not taken

    def _leave_out(self, shard: str, name: str, kind: ProblemKind, reason: str) -> None:
        self._tally.leave_out("members", kind, f"{shard}/{name}", reason)


def _holds_image(path: Path, member: TarMember) -> bool:
    return is_image(read_member(path, member._replace(size=min(member.size, HEAD_BYTES))))
