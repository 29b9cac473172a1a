"""The bytes of one shard file: chunks, then an index with its checksum.

``writer`` puts files together with ``shard_buffers``; ``mapped_rows`` takes them apart.

Source: Zarr v3 specification, codec ``sharding_indexed``, version 1.0.
"""

from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from movekd.cache.codecs import ArrayLayout
from movekd.cache.storage import Buffer

ABSENT = 2**64 - 1
"""Offset and size, in a shard's index, of a chunk that does not exist."""


def shard_buffers(
    rows: npt.NDArray[Any], array: ArrayLayout, rows_per_shard: int, compressor: str
) -> list[Buffer]:
    """Return the bytes of one shard file: the chunks in row order, then the index."""
    rows = np.ascontiguousarray(rows, np.dtype(array.dtype).newbyteorder("<"))
    if compressor == "none":
        chunks: list[Buffer] = [rows.reshape(-1).view(np.uint8).data]
        sizes = np.full(len(rows), array.row_bytes, np.uint64)
    else:
        encoder = chunk_compressor(compressor)
        chunks = [encoder.encode(row) for row in rows]
        sizes = np.array([len(chunk) for chunk in chunks], np.uint64)
    index = np.full((rows_per_shard, 2), ABSENT, "<u8")
    index[: len(rows), 1] = sizes
    index[: len(rows), 0] = np.cumsum(sizes) - sizes
    raw_index = index.tobytes()
    return [*chunks, raw_index + google_crc32c.value(raw_index).to_bytes(4, "little")]


def parse_index(raw: bytes) -> npt.NDArray[np.uint64] | None:
    """Return offset and size of each chunk, (rows_per_shard, 2). None: its checksum is wrong."""
    if google_crc32c.value(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    return np.frombuffer(raw[:-4], "<u8").reshape(-1, 2)


def chunk_compressor(compressor: str) -> Any:
    """Return the numcodecs codec that packs and unpacks a chunk; ``none`` has no such codec."""
    if compressor == "zstd":
        return Zstd(level=1)
    return Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE)


def zarr_compressors(compressor: str, array: ArrayLayout) -> Sequence[Any] | None:
    """Return what zarr must know to read the chunks of ``chunk_compressor``."""
    if compressor == "none":
        return None
    if compressor == "zstd":
        return [zarr.codecs.ZstdCodec(level=1)]
    item_bytes = np.dtype(array.dtype).itemsize
    return [zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=item_bytes)]
