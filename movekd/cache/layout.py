"""Names, shapes, chunks and attributes of everything in a cache of format 1.

    cache/
      cache.json                 format version, geometry, corpus fingerprint
      index.parquet              row, key, view, shard, offset, size, width, height
      names.parquet              name, key
      <teacher>.zarr/            a Zarr v3 group that stock libraries open
      <teacher>.seals/           what is finished, with checksums; not Zarr, so outside the group

The chunk of an array is one row. A Zarr shard is ``rows_per_shard`` rows of every array; one writer
writes it in one step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from movekd.cache import codecs
from movekd.cache.codecs import ArrayLayout
from movekd.errors import CacheError

FORMAT_VERSION = 1
SHARD_BYTES = 128 * 2**20
MAX_SHARD_ROWS = 1024
"""Appended images start at a multiple of it, which is one of every ``rows_per_shard``."""

CACHE_JSON = "cache.json"
INDEX = "index.parquet"
NAMES = "names.parquet"


@dataclass(frozen=True)
class TeacherLayout:
    """The arrays of one teacher's group by name, and the rows per Zarr shard."""

    arrays: Mapping[str, ArrayLayout]
    num_tokens: int
    width: int
    """Channels per token, however the codec packs them."""
    rows_per_shard: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all arrays."""
        return sum(array.row_bytes for array in self.arrays.values())

    def num_shards(self, num_rows: int) -> int:
        """Return how many Zarr shards hold ``num_rows`` rows."""
        return -(-num_rows // self.rows_per_shard)


def teacher_layout(
    codec: str, num_tokens: int, width: int, *, cls_width: int | None, num_heads: int | None
) -> TeacherLayout:
    """Return the arrays of a teacher: those of its codec, then ``cls`` and ``cls_attention``.

    ``cls_width`` or ``num_heads`` None means that the teacher has no such array.
    """
    arrays = [*codecs.codec(codec).arrays(num_tokens, width)]
    rows = rows_per_shard(arrays[0].row_bytes)
    if cls_width is not None:
        arrays.append(ArrayLayout("cls", (cls_width,), "float16", ("row", "channel")))
    if num_heads is not None:
        shape = (num_heads, num_tokens)
        arrays.append(ArrayLayout("cls_attention", shape, "float16", ("row", "head", "token")))
    return TeacherLayout({array.name: array for array in arrays}, num_tokens, width, rows)


def grid_side(num_tokens: int) -> int:
    """Return the side of a square grid of ``num_tokens``.

    Raises:
        CacheError: the tokens form no square.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise CacheError(f"{num_tokens} tokens form no square grid; movekd expects side x side.")
    return side


def rows_per_shard(token_row_bytes: int) -> int:
    """Return the largest power of two that keeps the tokens under 128 MiB, at most 1,024."""
    rows = MAX_SHARD_ROWS
    while rows > 1 and rows * token_row_bytes > SHARD_BYTES:
        rows //= 2
    return rows


def group_name(teacher: str) -> str:
    """Return the folder of a teacher's Zarr group, below the cache."""
    return f"{teacher}.zarr"


def seals_name(teacher: str) -> str:
    """Return the folder of a teacher's seals, below the cache."""
    return f"{teacher}.seals"


def calibration_name(teacher: str) -> str:
    """Return the name of the sealed calibration."""
    return f"{teacher}.seals/calibration.json"


def metadata_name(teacher: str) -> str:
    """Return the seal of the group's small files: each zarr.json and the channel statistics."""
    return f"{teacher}.seals/metadata.json"


def seal_name(teacher: str, shard: int) -> str:
    """Return the seal of one Zarr shard."""
    return f"{teacher}.seals/{shard:05d}.json"


def skipped_name(teacher: str) -> str:
    """Return the table of the images that could not be read: row, key, reason."""
    return f"{teacher}.seals/skipped.parquet"


def skipped_seal_name(teacher: str) -> str:
    """Return the seal of that table."""
    return f"{teacher}.seals/skipped.json"


def group_arrays(codec: str, width: int) -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays of a group without rows, as they are before the calibration fills them.

    First the channel statistics, then the codec's own arrays by name: the order of their checksum.
    """
    statistics = {name: np.zeros(width, "<f4") for name in ("channel_mean", "channel_std")}
    return statistics | dict(sorted(codecs.codec(codec).group_arrays(width).items()))


def group_array_file(name: str, num_dimensions: int) -> str:
    """Return the only file of an array without rows, relative to the group."""
    return f"{name}/c" + "/0" * num_dimensions


def index_bytes(rows_per_shard: int) -> int:
    """Return the size of a shard file's index: offset and size of each chunk, and a CRC-32C."""
    return 16 * rows_per_shard + 4


def shard_file(array: ArrayLayout, shard: int) -> str:
    """Return the file of one Zarr shard, relative to the group: Zarr's default chunk key."""
    return f"{array.name}/c/{shard}" + "/0" * len(array.row_shape)
