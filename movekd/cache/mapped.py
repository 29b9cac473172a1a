"""An uncompressed Zarr shard on a local disk, mapped and read through its own index.

The fast path of ``reader``: a row is one copy from the file into the batch.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from movekd.cache.layout import ArrayLayout
from movekd.errors import CacheError, CorruptCacheError


class MappedShard:
    """One uncompressed shard file, mapped; its chunks lie at equal distances in any order."""

    def __init__(self, path: Path, array: ArrayLayout, rows_per_shard: int) -> None:
        index_bytes = 16 * rows_per_shard + 4
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < index_bytes:
                    raise CorruptCacheError(
                        f"{path} has {size} bytes, less than its index of {index_bytes}: it is "
                        "truncated. Run `movekd cache verify`."
                    )
                self._bytes = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise CorruptCacheError(
                f"{path} is sealed but cannot be opened ({error.strerror}). "
                "Run `movekd cache verify`."
            ) from None
        raw_index = self._bytes[-index_bytes:-4]
        if google_crc32c.value(raw_index) != int.from_bytes(self._bytes[-4:], "little"):
            raise CorruptCacheError(
                f"{path}: the checksum of the shard index is wrong; the file is truncated or "
                "damaged. Run `movekd cache verify`."
            )
        index = np.frombuffer(raw_index, "<u8").reshape(rows_per_shard, 2)
        present = index[:, 0] != 2**64 - 1
        offsets, sizes = index[present].T.astype(np.int64)
        data_bytes = size - index_bytes
        if (sizes != array.row_bytes).any() or (offsets % array.row_bytes).any():
            raise CorruptCacheError(
                f"{path} holds chunks of other sizes than the {array.row_bytes} bytes of a row; "
                "it was not written by movekd. Run `movekd cache verify`."
            )
        if len(offsets) and int(offsets.max()) + array.row_bytes > data_bytes:
            raise CorruptCacheError(f"{path} is truncated. Run `movekd cache verify`.")
        self._row_bytes = array.row_bytes
        self._path = path
        self._position = np.full(rows_per_shard, -1, np.int64)
        self._position[present] = offsets // array.row_bytes
        count = data_bytes // array.row_bytes
        flat = np.frombuffer(self._bytes, array.dtype, count * int(np.prod(array.row_shape)))
        self._rows = flat.reshape(count, *array.row_shape)

    def announce(self, offset: int) -> None:
        """Tell the kernel that this row is about to be read."""
        start = int(self._position[offset]) * self._row_bytes
        if start >= 0:
            aligned = start - start % mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_WILLNEED, aligned, start - aligned + self._row_bytes)

    def row(self, offset: int) -> npt.NDArray[Any]:
        """Return a view of one row."""
        position = self._position[offset]
        if position < 0:
            raise CacheError(
                f"row {offset} of {self._path} was never written: it lies in the gap before "
                "appended images. Take rows from `cache.rows(names)`."
            )
        view: npt.NDArray[Any] = self._rows[position]
        return view
