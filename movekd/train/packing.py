"""Pack samples into rows: which ones stand together, and how many positions stay empty.

Input: the length of every sample, in tokens. Output: rows, each a list of samples that fit into
``data.model_max_length`` together. Samples stay whole. The rows depend only on lengths and seed: an
epoch shuffles rows, so each epoch has as many steps, and a resume knows every row.

Used by ``packed_data``.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from movekd.errors import ConfigError


def pack_rows(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Return rows of samples, by best-fit decreasing: the fullest row that still has room.

    Samples go from the longest to the shortest. Equal ones are in random order, and so are the
    samples of a row.

    Args:
        lengths: tokens per sample, each at least 1.
        max_length: tokens of a row.
        seed: of the random order.

    Raises:
        ConfigError: a sample is longer than a row.

    Source: best-fit decreasing of bin packing; "Fewer Truncations Improve Language Modeling"
    (arXiv 2404.10830), as in TRL's ``packing_strategy: bfd``.
    """
    tokens = np.asarray(lengths, np.int64)
    if len(tokens) and not 0 < tokens.min() <= tokens.max() <= max_length:
        raise ConfigError(
            f"a sample has {tokens.min():,} to {tokens.max():,} tokens; expected 1 to "
            f"data.model_max_length {max_length:,} to pack it. Raise model_max_length."
        )
    random = np.random.default_rng([seed, max_length])
    order = random.permutation(len(tokens))
    order = order[np.argsort(-tokens[order], kind="stable")]
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens that still fit -> rows
    rooms: list[int] = []  # its keys, sorted
    for sample, length in zip(order.tolist(), tokens[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(sample)
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    place = random.permutation(len(tokens)).tolist()
    return [sorted(row, key=place.__getitem__) for row in rows]


def row_lengths(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return the tokens of each row, (R,)."""
    return np.array([sum(lengths[sample] for sample in row) for row in rows], np.int64)


def padding_share(lengths: ArrayLike, batch_size: int) -> float:
    """Return the share of positions that are padding, if rows go into batches in this order.

    A batch is as wide as its longest row.

    Args:
        lengths: tokens of each row, in order.
        batch_size: rows per batch; the last one may hold fewer.
    """
    tokens = np.asarray(lengths, np.int64)
    starts = np.arange(0, len(tokens), batch_size)
    sizes = np.diff(np.append(starts, len(tokens)))
    positions = int((np.maximum.reduceat(tokens, starts) * sizes).sum())
    return 1 - int(tokens.sum()) / positions
