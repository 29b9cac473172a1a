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
from movekd.corpus.index import Corpus, open_corpus
from movekd.errors import ConfigError
from movekd.train.config import DataConfig, TrainConfig
from movekd.train.data import read_conversations

SPLIT = "sha256 of image keys"
"""Name of the rule that splits; another name is another split (see ``fingerprints``)."""


def split_conversations(
    data: DataConfig, corpus: Corpus
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the conversations to learn from, and the held-out ones.

    Raises:
        ConfigError: a part would be empty, or a file is malformed.
        UnknownKeyError: an image is missing from the corpus.
    """
    conversations = read_conversations(data, corpus)
    if data.eval_conversations:
        return conversations, _read_held_out(data)
    if data.val_size is None:
        return conversations, []
    is_held = choose(_groups(conversations, corpus), data.val_size, "conversations")
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation, part in zip(conversations, is_held.tolist(), strict=True):
        parts[part].append(conversation)
    return parts


def split_images(data: DataConfig, corpus: Corpus) -> NDArray[np.bool_] | None:
    """Return which images of a corpus stage distill holds out; None: none.

    Raises:
        ConfigError: a part would be empty, or a file is malformed.
        UnknownKeyError: an image of ``data.eval_conversations`` is missing from the corpus.
    """
    if data.val_size is not None:
        chunks = corpus.index["key"].chunks
        hashes = (_hash("image", key) for chunk in chunks for key in chunk.to_pylist())
        return choose(np.fromiter(hashes, np.uint64, len(corpus)), data.val_size, "images")
    if not data.eval_conversations:
        return None
    names = [name for conversation in _read_held_out(data) for name in conversation.images]
    is_held = np.zeros(len(corpus), np.bool_)
    if names:
        is_held[corpus.rows(names)] = True
    if not is_held.any() or is_held.all():
        raise ConfigError(
            f"data.eval_conversations name {is_held.sum():,} of the {len(corpus):,} images of "
            f"{corpus.data_dir}, which stage distill holds out; expected some and not all. Give "
            "other files, or data.val_size."
        )
    return is_held


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
    """Return how many samples are held out, from the corpus only; None if none are.

    Raises:
        MovekdError: the split cannot be made.
    """
    data = config.data
    if data.val_size is None and not data.eval_conversations:
        return None
    corpus = open_corpus(data.shards)
    if config.stage == "distill":
        is_held = split_images(data, corpus)
        assert is_held is not None
        return describe(int((~is_held).sum()), int(is_held.sum()), "images")
    trained, held = split_conversations(data, corpus)
    shared = count_shared(_rows(trained, corpus), _rows(held, corpus))
    return describe(len(trained), len(held), "conversations", shared)


def _read_held_out(data: DataConfig) -> list[Conversation]:
    found = [c for path in data.eval_conversations for c in load_conversations(path)]
    if not found:
        raise ConfigError(
            "data.eval_conversations hold no conversation; expected some to measure the loss on. "
            "Give other files, or data.val_size."
        )
    return found


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
