"""Index existing WebDataset tars where they lie: ``movekd shards pack --webdataset``.

Input: a folder of uncompressed tars. Output: index, names and conversations beside them. The tars
are not changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from movekd.corpus.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    parse_conversation,
    parse_json,
)
from movekd.corpus.image_source import (
    IMAGE_EXTENSIONS,
    ImageSource,
    RejectedImage,
    examine_images,
    printable,
    require_folder,
)
from movekd.corpus.pack import DEFAULT_WORKERS, Progress
from movekd.corpus.publish import STAGING_DIR
from movekd.corpus.report import PackReport
from movekd.corpus.tar import TarMember, read_member, read_members, split_member
from movekd.corpus.writer import CorpusBuilder, build_corpus
from movekd.errors import ConfigError, CorpusError

_COMPRESSED_TARS = ("*.tar.gz", "*.tgz", "*.tar.zst", "*.tar.bz2", "*.tar.xz")


@dataclass
class _Sample:
    """The images and texts of one WebDataset sample."""

    key: str
    shard: str
    images: list[TarMember] = field(default_factory=list)
    texts: dict[str, TarMember] = field(default_factory=dict)  # "json", "txt"


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
    A .json member holds a LLaVA entry or a list of entries about the images of its sample, whatever
    ``image`` says; a member without ``conversations`` is ignored. A .txt member is a caption.

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
    tars = [path for path in sorted(shards_dir.rglob("*.tar")) if path.parent.name != STAGING_DIR]
    with build_corpus(shards_dir, overwrite, force=force) as builder:
        for path in sorted(p for pattern in _COMPRESSED_TARS for p in shards_dir.rglob(pattern)):
            name = path.relative_to(shards_dir).as_posix()
            builder.note("damaged_shards", name, "is compressed; unpack it to a plain .tar")
        seen: set[str] = set()
        for done, path in enumerate(tars):
            shard = path.relative_to(shards_dir).as_posix()
            samples = []
            for sample in _read_samples(builder, path, shard):
                if sample.key in seen:  # a name must mean one image
                    reason = f"a sample of this key came before the one in {shard}"
                    builder.note("duplicate_samples", printable(sample.key), reason)
                else:
                    seen.add(sample.key)
                    samples.append(sample)
            _index_samples(builder, samples, path, shard, num_workers)
            if progress is not None:
                progress(done + 1, len(tars))
    return builder.report()


def _read_samples(builder: CorpusBuilder, path: Path, shard: str) -> list[_Sample]:
    """Return the samples of a tar; a sample is a run of members with the same key."""
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
                builder.note("duplicate_samples", printable(member.name), f"twice in {shard}")
            elif kind in IMAGE_EXTENSIONS:
                samples[-1].images.append(member)
            elif extension in ("json", "txt"):
                samples[-1].texts.setdefault(extension, member)
    except CorpusError as error:
        builder.note("damaged_shards", shard, str(error).replace(str(path), "it", 1))
    else:
        if not any(sample.images for sample in samples):
            builder.note("damaged_shards", shard, "it holds no image")
    return samples


def _index_samples(
    builder: CorpusBuilder, samples: list[_Sample], path: Path, shard: str, num_workers: int
) -> None:
    sources = [
        ImageSource([sample.key, member.name] if number == 0 else [member.name], path, member)
        for sample in samples
        for number, member in enumerate(sample.images)
    ]
    rejected: dict[str, RejectedImage] = {}
    for source, found in zip(sources, examine_images(sources, num_workers), strict=True):
        if isinstance(found, RejectedImage):
            rejected.update((name, found) for name in source.names)
            builder.note(found.kind, f"{shard}/{printable(source.names[-1])}", found.reason)
        else:
            builder.add_image(found)
    for sample in samples:
        for entry in _sample_conversations(builder, sample, path):
            matched = builder.match_placeholders(entry)
            if matched is not None:
                builder.keep_or_drop(matched, rejected)


def _sample_conversations(
    builder: CorpusBuilder, sample: _Sample, path: Path
) -> Iterator[Conversation]:
    """Yield the conversations of a sample: of its .json member, else of its .txt member."""
    key = printable(sample.key)
    images = tuple(member.name for member in sample.images)
    if len(images) == 1:
        images = (sample.key,)
    content: Any = None
    try:
        if "json" in sample.texts:
            member = sample.texts["json"]
            where = f"{sample.shard}/{member.name}"
            content = parse_json(read_member(path, member), where)
        entries = content if isinstance(content, list) else [content]
        entries = [e for e in entries if isinstance(e, dict) and "conversations" in e]
        for entry in entries:
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
        caption = read_member(path, sample.texts["txt"]).decode("utf-8", "replace").strip()
        question = "\n".join([IMAGE_PLACEHOLDER] * len(images))
        yield Conversation(key, images, (("human", question), ("gpt", caption)))
