"""Choose the samples that a run does not learn from, to measure its loss on them.

Input: ``data.val_size`` or ``data.eval_conversations``. Output: two parts of the conversations, or
in stage distill of the images. No image is in both parts of a split: conversations that share an
image, also through others, stay together. The order of SHA-256 values decides, so a split depends
on nothing but the data, and the stages of a run hold about the same images out.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from movekd.corpus.conversations import Conversation, load_conversations
from movekd.corpus.index import Corpus
from movekd.errors import ConfigError
from movekd.train.config import TrainConfig
from movekd.train.data import read_conversations
from movekd.train.data_keys import DataConfig
from movekd.train.sources import describe_shares, image_starts, open_corpora

SPLIT = "sha256 of image keys"
"""Name of the rule that splits; another name is another split (see ``fingerprints``)."""


def split_conversations(
    data: DataConfig, corpora: Sequence[Corpus]
) -> list[tuple[list[Conversation], list[Conversation]]]:
    """Return the conversations to learn from and the held-out ones, per source.

    Args:
        data: says which are held out.
        corpora: of each source; sources of one corpus have one object.

    Raises:
        ConfigError: a part would be empty, or a file is malformed.
        UnknownKeyError: an image is missing from the corpus.
    """
    sources = data.all_sources()
    found = [read_conversations(s, corpus) for s, corpus in zip(sources, corpora, strict=True)]
    if data.has_held_out_files:
        return list(zip(found, _read_held_out(data), strict=True))
    if data.val_size is None:
        return [(conversations, []) for conversations in found]
    groups = _groups_of_sources(found, corpora)
    is_held = choose(np.concatenate(groups), data.val_size, "conversations")
    parts: list[tuple[list[Conversation], list[Conversation]]] = []
    ends = np.cumsum([len(conversations) for conversations in found])[:-1]
    for conversations, is_part_held in zip(found, np.split(is_held, ends), strict=True):
        part: tuple[list[Conversation], list[Conversation]] = ([], [])
        for conversation, which in zip(conversations, is_part_held.tolist(), strict=True):
            part[which].append(conversation)
        parts.append(part)
    return parts


def split_images(data: DataConfig, corpora: Sequence[Corpus]) -> list[NDArray[np.bool_]] | None:
    """Return which images of each source's corpus stage distill holds out; None: none.

    Raises:
        ConfigError: a part would be empty, or a file is malformed.
        UnknownKeyError: an image of ``data.eval_conversations`` is missing from the corpus.
    """
    sizes = [len(corpus) for corpus in corpora]
    if data.val_size is not None:
        hashes = (
            _hash("image", key)
            for corpus in corpora
            for chunk in corpus.index["key"].chunks
            for key in chunk.to_pylist()
        )
        is_held = choose(np.fromiter(hashes, np.uint64, sum(sizes)), data.val_size, "images")
        return np.split(is_held, np.cumsum(sizes)[:-1])
    if not data.has_held_out_files:
        return None
    found = []
    for corpus, held in zip(corpora, _read_held_out(data), strict=True):
        is_held = np.zeros(len(corpus), np.bool_)
        is_held[_rows(held, corpus)] = True
        found.append(is_held)
    num_held = sum(int(is_held.sum()) for is_held in found)
    if num_held in (0, sum(sizes)):
        raise ConfigError(
            f"data.eval_conversations name {num_held:,} of the {sum(sizes):,} images of "
            f"{', '.join(str(corpus.data_dir) for corpus in corpora)}, which stage distill holds "
            "out; expected some and not all. Give other files, or data.val_size."
        )
    return found


def choose(groups: NDArray[np.uint64], size: float, unit: str) -> NDArray[np.bool_]:
    """Return which samples are held out, at most ``size`` of them.

    Samples of one group stay together. A group that is larger than the room left is not held out.

    Args:
        groups: the group of each sample, a hash; the smallest ones are held out.
        size: below 1 a share of the samples, rounded up; otherwise their number.
        unit: what a sample is, for messages.

    Raises:
        ConfigError: no sample or every sample would be held out.
    """
    room = math.ceil(round(size * len(groups), 6)) if size < 1 else int(size)
    _, group_of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    is_held = np.zeros(len(counts), np.bool_)
    for group, count in enumerate(counts.tolist()):
        if count <= room:
            is_held[group] = True
            room -= count
        if not room:
            break
    if is_held.all() or not is_held.any():
        reason = ""
        if len(counts) < len(groups):
            reason = f", which are {len(counts):,} groups that share no image"
        raise ConfigError(
            f"data.val_size {size:g} would hold out {'all' if is_held.all() else 'none'} of the "
            f"{len(groups):,} {unit}{reason}; expected some to learn from and some to hold out. "
            "Set another number."
        )
    held: NDArray[np.bool_] = is_held[group_of]
    return held


def describe(num_trained: int, num_held: int, unit: str, num_shared: int = 0) -> str:
    """Return how many samples are held out, as one line.

    Args:
        num_trained: samples to learn from.
        num_held: held-out samples.
        unit: what a sample is.
        num_shared: held-out images that are also in samples to learn from.
    """
    said = f"{num_held:,} {unit} are held out, {num_trained:,} are trained on"
    if num_shared:
        said += f"; {num_shared:,} images of the held-out ones are trained on, too"
    return f"{said}."


def count_shared(trained: NDArray[np.int64], held: NDArray[np.int64]) -> int:
    """Return how many distinct images of ``held`` are also in ``trained``, by corpus row."""
    return int(np.isin(np.unique(held), trained).sum())


def describe_split(config: TrainConfig) -> str | None:
    """Return how many samples are held out, from the corpora only; None if none are.

    Raises:
        MovekdError: the split cannot be made.
    """
    data = config.data
    if data.val_size is None and not data.has_held_out_files:
        return None
    corpora = open_corpora(data)
    if config.stage == "distill":
        masks = split_images(data, corpora)
        assert masks is not None
        is_held = np.concatenate(masks)
        return describe(int((~is_held).sum()), int(is_held.sum()), "images")
    starts = image_starts(corpora)
    split = split_conversations(data, corpora)
    rows = [
        np.concatenate(
            [_rows(parts[i], c) + at for parts, c, at in zip(split, corpora, starts, strict=True)]
        )
        for i in (0, 1)
    ]
    trained, held = (sum(len(parts[i]) for parts in split) for i in (0, 1))
    return describe(trained, held, "conversations", count_shared(rows[0], rows[1]))


def describe_sources(config: TrainConfig) -> list[str]:
    """Return what an epoch takes of each of several sources, from the corpora only.

    Raises:
        MovekdError: the samples cannot be read.
    """
    data, keys = config.data, config.data.all_sources()
    if not data.sources:
        return []
    corpora = open_corpora(data)
    if config.stage == "distill":
        masks = split_images(data, corpora)
        sizes = [len(corpus) for corpus in corpora]
        if masks is not None:
            sizes = [int((~is_held).sum()) for is_held in masks]
        unit = "images"
    else:
        sizes = [len(trained) for trained, _ in split_conversations(data, corpora)]
        unit = "conversations"
    return describe_shares([k.name for k in keys], sizes, [k.weight for k in keys], unit)


def _read_held_out(data: DataConfig) -> list[list[Conversation]]:
    """Return the held-out conversations of each source."""
    found = [
        [c for path in source.eval_conversations for c in load_conversations(path)]
        for source in data.all_sources()
    ]
    if not any(found):
        raise ConfigError(
            "data.eval_conversations hold no conversation; expected some to measure the loss on. "
            "Give other files, or data.val_size."
        )
    return found


def _groups_of_sources(
    found: Sequence[Sequence[Conversation]], corpora: Sequence[Corpus]
) -> list[NDArray[np.uint64]]:
    """Return the group of each conversation, per source; sources of one corpus share images."""
    groups: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)] * len(found)
    for corpus in dict.fromkeys(corpora):
        mine = [number for number, other in enumerate(corpora) if other is corpus]
        joined = [conversation for number in mine for conversation in found[number]]
        ends = np.cumsum([len(found[number]) for number in mine])[:-1]
        for number, part in zip(mine, np.split(_groups(joined, corpus), ends), strict=True):
            groups[number] = part
    return groups


def _rows(conversations: Sequence[Conversation], corpus: Corpus) -> NDArray[np.int64]:
    """Return the corpus row of every image of some conversations, in order."""
    names = [name for conversation in conversations for name in conversation.images]
    return corpus.rows(names) if names else np.empty(0, np.int64)


def _groups(conversations: Sequence[Conversation], corpus: Corpus) -> NDArray[np.uint64]:
    """Return a hash of the group of each conversation; those that share an image have one group.

    A conversation without images is in a group with those of the same text.
    """
    rows = _rows(conversations, corpus).tolist()
    ends = np.cumsum([len(conversation.images) for conversation in conversations]).tolist()
    starts = [0, *ends[:-1]]
    above: dict[int, int] = {}  # a forest of corpus rows; a tree holds the images of a group

    def root(row: int) -> int:
        while (up := above.get(row, row)) != row:
            above[row] = above.get(up, up)
            row = up
        return row

    for start, end in zip(starts, ends, strict=True):
        for row in rows[start + 1 : end]:
            above[root(row)] = root(rows[start])
    distinct = sorted(set(rows))
    taken = corpus.index["key"].take(pa.array(distinct, pa.int64())).to_pylist()
    keys: dict[int, list[str]] = {}
    for row, key in zip(distinct, taken, strict=True):
        keys.setdefault(root(row), []).append(key)
    group = {row: _hash("image", *sorted(names)) for row, names in keys.items()}
    found = [
        group[root(rows[start])]
        if end > start
        else _hash("text", *(part for turn in conversation.turns for part in turn))
        for conversation, start, end in zip(conversations, starts, ends, strict=True)
    ]
    return np.array(found, np.uint64)


def _hash(*parts: str) -> int:
    """Return the first 8 bytes of the SHA-256 of some texts."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")
