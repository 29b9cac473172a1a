"""Images and conversations in, a corpus folder out: ``movekd shards pack``.

    pack_llava         LLaVA's JSON and its image folder -> shards, index, names, conversations
    pack_folder        a folder of images                -> shards, index, names
    index_webdataset   tars that exist already           -> index, names, conversations beside them

Each distinct image is stored once, in order of first appearance. A folder with an index is whole,
and an interrupted pack is run again. The same input gives the same bytes. Only a few images are
in memory at a time, and an image that cannot be used is reported, not raised.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from movekd.corpus.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    load_conversations,
    parse_conversation,
    parse_json,
)
from movekd.corpus.decode import FILE_EXTENSIONS, ImageInfo, probe_image
from movekd.corpus.report import PackReport, ProblemKind
from movekd.corpus.tar import ShardWriter, TarMember, read_members, split_member
from movekd.corpus.writer import STAGING_DIR, CorpusBuilder, building
from movekd.errors import ConfigError, CorpusError, UnreadableImageError

DEFAULT_SHARD_BYTES = 512 * 2**20
DEFAULT_WORKERS = min(8, os.cpu_count() or 1)

Progress = Callable[[int, int], None]
"""Called with (done, total): images of a pack, tars of an existing WebDataset."""

_IMAGE_EXTENSIONS = {*FILE_EXTENSIONS.values(), "jpeg", "tif"}
_COMPRESSED_TARS = ("*.tar.gz", "*.tgz", "*.tar.zst", "*.tar.bz2", "*.tar.xz")


def pack_llava(
    json_paths: Sequence[Path],
    image_dir: Path,
    out_dir: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the images that LLaVA files name, and the conversations that can be used.

    An entry is dropped if one of its images cannot be used, or if its text has more ``<image>``
    than it has images. Where ``<image>`` is missing it is put before the first question, as
    LLaVA's own files have it. Both are reported.

    Args:
        json_paths: LLaVA's files, .json or .jsonl.
        image_dir: what the paths in them are relative to.
        out_dir: made if need be.
        max_shard_bytes: a tar is closed before it would grow larger.
        num_workers: threads that decode images; the result does not depend on it.
        overwrite: replace another corpus in ``out_dir``, its ``shard-*.tar`` included.
        progress: told how many images are done.

    Raises:
        ConfigError: a LLaVA file is missing or malformed.
        CorpusError: ``out_dir`` holds another corpus or cannot be written, or no image is usable.
    """
    _require_folder(image_dir)
    conversations = [entry for path in json_paths for entry in load_conversations(path)]
    with building(out_dir, overwrite, writes_shards=True) as builder:
        entries = list(filter(None, (_place_images(builder, entry) for entry in conversations)))
        names = dict.fromkeys(name for entry in entries for name in entry.images)
        sources = [_Source([name], image_dir / name) for name in names]
        rejected = _pack_images(builder, sources, max_shard_bytes, num_workers, progress)
        for entry in entries:
            _keep_or_drop(builder, entry, rejected)
    return builder.report()


def pack_folder(
    image_dir: Path,
    out_dir: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack every image under a folder, in the order of the paths, which become the names.

    Files are told from others by their extension. Arguments and errors as in ``pack_llava``.
    """
    _require_folder(image_dir)
    found = (path for path in image_dir.rglob("*") if not path.is_dir())
    names = sorted(path.relative_to(image_dir).as_posix() for path in found)
    images = [name for name in names if PurePosixPath(name).suffix[1:].lower() in _IMAGE_EXTENSIONS]
    with building(out_dir, overwrite, writes_shards=True) as builder:
        sources = [_Source([name], image_dir / name) for name in images]
        rejected = _pack_images(builder, sources, max_shard_bytes, num_workers, progress)
        for name, rejection in rejected.items():
            builder.note(rejection.kind, _printable(name), rejection.reason)
    return builder.report()


def index_webdataset(
    shards_dir: Path,
    *,
    num_workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Index the images in the tars under a folder where they are, and gather their conversations.

    An image goes by its sample key (``path/without/extension``) and by its full member name. A
    .json member is a LLaVA entry or a list of them, about the sample's own image whatever its
    ``image`` says; one without ``conversations`` is passed over. A .txt member is a caption.

    Args:
        shards_dir: folder of uncompressed tars; the index is written into it.
        num_workers: threads that decode images; the result does not depend on it.
        overwrite: replace another index.
        progress: told how many tars are done.

    Raises:
        CorpusError: no image is usable, another index is there, or the folder cannot be written.
    """
    _require_folder(shards_dir)
    tars = [path for path in sorted(shards_dir.rglob("*.tar")) if path.parent.name != STAGING_DIR]
    with building(shards_dir, overwrite, writes_shards=False) as builder:
        for path in sorted(p for pattern in _COMPRESSED_TARS for p in shards_dir.rglob(pattern)):
            name = path.relative_to(shards_dir).as_posix()
            builder.note("damaged_shards", name, "is compressed; unpack it to a plain .tar")
        seen: set[str] = set()
        for done, path in enumerate(tars):
            shard = path.relative_to(shards_dir).as_posix()
            samples = [s for s in _read_samples(builder, path, shard) if _is_new(builder, s, seen)]
            _index_samples(builder, samples, path, shard, num_workers)
            if progress is not None:
                progress(done + 1, len(tars))
    return builder.report()


@dataclass(frozen=True)
class _Source:
    """Where an image comes from: a whole file to be packed, or a part of a tar to be indexed."""

    names: list[str]
    path: Path
    member: TarMember | None = None


@dataclass(frozen=True)
class _Found:
    """A usable image; ``data`` is empty if it is only indexed."""

    source: _Source
    key: str
    info: ImageInfo
    size_bytes: int
    data: bytes


@dataclass(frozen=True)
class _Rejected:
    """An image that cannot be used."""

    source: _Source
    kind: ProblemKind
    reason: str


@dataclass
class _Sample:
    """The members of a WebDataset sample that mean something here."""

    key: str
    shard: str
    images: list[TarMember] = field(default_factory=list)
    texts: dict[str, TarMember] = field(default_factory=dict)  # "json", "txt"


def _pack_images(
    builder: CorpusBuilder,
    sources: list[_Source],
    max_shard_bytes: int,
    num_workers: int,
    progress: Progress | None,
) -> dict[str, _Rejected]:
    """Write image files to shards; return the ones that cannot be used, by name."""
    rejected: dict[str, _Rejected] = {}
    with ShardWriter(builder.staging, max_shard_bytes) as shards:
        for done, found in enumerate(_examine_all(sources, num_workers)):
            if isinstance(found, _Rejected):
                rejected[found.source.names[-1]] = found
            else:
                name = f"{found.key}.{found.info.extension}"
                _add(builder, found, partial(shards.add, name, found.data))
            if progress is not None:
                progress(done + 1, len(sources))
    return rejected


def _add(builder: CorpusBuilder, found: _Found, place: Callable[[], tuple[str, int]]) -> None:
    size = (found.info.width, found.info.height)
    builder.add_image(found.key, found.source.names, size, found.size_bytes, place)


def _lies_at(shard: str, offset: int) -> tuple[str, int]:
    """Return the place of an image that a tar holds already."""
    return shard, offset


def _examine_all(sources: Iterable[_Source], num_workers: int) -> Iterator[_Found | _Rejected]:
    """Yield what each source holds, in order; a few a thread are under way at a time."""
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque[Future[_Found | _Rejected]] = deque()
        for source in sources:
            if len(pending) == 2 * num_workers:
                yield pending.popleft().result()
            pending.append(pool.submit(_examine, source))
        while pending:
            yield pending.popleft().result()


def _examine(source: _Source) -> _Found | _Rejected:
    """Read and decode one image. Pillow and hashlib let the other threads work meanwhile."""
    name = source.names[-1]
    path = PurePosixPath(name)
    if _printable(name) != name:
        return _Rejected(source, "refused_paths", f"{_printable(name)} is not Unicode; rename it")
    if source.member is None and (path.is_absolute() or ".." in path.parts):
        return _Rejected(source, "refused_paths", f"{name} leads out of the image folder")
    try:
        data = _read(source)
    except (FileNotFoundError, NotADirectoryError):
        return _Rejected(source, "missing_files", f"{name} does not exist in the image folder")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return _Rejected(source, "unreadable_images", f"{name} cannot be read: {reason}")
    try:
        info = probe_image(data)
    except UnreadableImageError as error:
        return _Rejected(source, "unreadable_images", f"{name}: {error}")
    key = hashlib.sha256(data).hexdigest()
    return _Found(source, key, info, len(data), data if source.member is None else b"")


def _read(source: _Source) -> bytes:
    """Return the bytes of a source."""
    if source.member is None:
        return source.path.read_bytes()
    with source.path.open("rb") as file:
        file.seek(source.member.offset)
        return file.read(source.member.size)


def _place_images(builder: CorpusBuilder, entry: Conversation) -> Conversation | None:
    """Return a conversation with as many ``<image>`` as images, or None if it has more."""
    builder.num_entries += 1
    missing = len(entry.images) - entry.num_placeholders
    found = f"{entry.num_placeholders} {IMAGE_PLACEHOLDER} in the text, {len(entry.images)} images"
    if missing == 0:
        return entry
    human = [number for number, (role, _) in enumerate(entry.turns) if role == "human"]
    if missing < 0 or not human:
        reason = found if missing < 0 else f"{found}, and no human turn to hold the rest"
        builder.note(
            "surplus_placeholders" if missing < 0 else "malformed_entries", entry.id, reason
        )
        return None
    builder.note("added_placeholders", entry.id, found)
    turns = list(entry.turns)
    role, text = turns[human[0]]
    turns[human[0]] = (role, f"{IMAGE_PLACEHOLDER}\n" * missing + text)
    return replace(entry, turns=tuple(turns))


def _keep_or_drop(
    builder: CorpusBuilder, entry: Conversation, rejected: dict[str, _Rejected]
) -> None:
    """Write a conversation, or report the first of its images that cannot be used."""
    for name in entry.images:
        if name in rejected:
            builder.note(rejected[name].kind, entry.id, rejected[name].reason)
            return
    builder.add_conversation(entry)


def _read_samples(builder: CorpusBuilder, path: Path, shard: str) -> list[_Sample]:
    """Return the samples of a tar: members of one key that follow each other."""
    samples: list[_Sample] = []
    try:
        for member in read_members(path):
            key, extension = split_member(member.name) or ("", "")
            if not key:
                continue
            if not samples or samples[-1].key != key:
                samples.append(_Sample(key, shard))
            kind = extension.rpartition(".")[2]
            if member.name in (image.name for image in samples[-1].images):
                builder.note("duplicate_samples", _printable(member.name), f"twice in {shard}")
            elif kind in _IMAGE_EXTENSIONS:
                samples[-1].images.append(member)
            elif extension in ("json", "txt"):
                samples[-1].texts.setdefault(extension, member)
    except CorpusError as error:
        builder.note("damaged_shards", shard, str(error).replace(str(path), "it", 1))
    else:
        if not any(sample.images for sample in samples):
            builder.note("damaged_shards", shard, "it holds no image")
    return samples


def _is_new(builder: CorpusBuilder, sample: _Sample, seen: set[str]) -> bool:
    """Return whether no sample of this key came before; a name must mean one image."""
    if sample.key in seen:
        reason = f"a sample of this key came before the one in {sample.shard}"
        builder.note("duplicate_samples", _printable(sample.key), reason)
        return False
    seen.add(sample.key)
    return True


def _index_samples(
    builder: CorpusBuilder, samples: list[_Sample], path: Path, shard: str, num_workers: int
) -> None:
    """Add the images and conversations of one tar."""
    sources = [
        _Source([sample.key, member.name] if number == 0 else [member.name], path, member)
        for sample in samples
        for number, member in enumerate(sample.images)
    ]
    rejected: dict[str, _Rejected] = {}
    for source, found in zip(sources, _examine_all(sources, num_workers), strict=True):
        if isinstance(found, _Rejected):
            rejected.update((name, found) for name in source.names)
            builder.note(found.kind, f"{shard}/{_printable(source.names[-1])}", found.reason)
        elif source.member is not None:
            _add(builder, found, partial(_lies_at, shard, source.member.offset))
    for sample in samples:
        for entry in _sample_conversations(builder, sample, path):
            placed = _place_images(builder, entry)
            if placed is not None:
                _keep_or_drop(builder, placed, rejected)


def _sample_conversations(
    builder: CorpusBuilder, sample: _Sample, path: Path
) -> Iterator[Conversation]:
    """Yield the conversations of a sample: of its .json member, else of its .txt member."""
    key = _printable(sample.key)
    images = tuple(member.name for member in sample.images)
    if len(images) == 1:
        images = (sample.key,)
    content: Any = None
    try:
        if "json" in sample.texts:
            member = sample.texts["json"]
            content = parse_json(_read(_Source([], path, member)), f"{sample.shard}/{member.name}")
        entries = content if isinstance(content, list) else [content]
        entries = [e for e in entries if isinstance(e, dict) and "conversations" in e]
        for entry in entries:
            where = f"{sample.shard}/{sample.texts['json'].name}"
            conversation = parse_conversation({"id": key, **entry}, where)
            if conversation.images and not images:
                builder.num_entries += 1
                builder.note("missing_files", conversation.id, f"sample {key} holds no image")
            else:
                yield replace(conversation, images=images)
    except ConfigError as error:
        builder.num_entries += 1
        builder.note("malformed_entries", key, str(error))
        return
    if not entries and "txt" in sample.texts and images:
        text = _read(_Source([], path, sample.texts["txt"]))
        caption = text.decode("utf-8", "replace").strip()
        question = "\n".join([IMAGE_PLACEHOLDER] * len(images))
        yield Conversation(key, images, (("human", question), ("gpt", caption)))


def _printable(name: str) -> str:
    """Return a name with question marks for bytes that are not Unicode."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise CorpusError(f"{path} is no folder; expected one of images. Correct the path.")
