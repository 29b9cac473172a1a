"""Open one of the two tables of a cache, index.parquet and names.parquet, as a stranger's file.

Input: the cache, and what cache.json says of the table. Output: a ``ParquetTable`` of exactly the
expected columns. Its keys are checked when they are decoded first, so that opening stays fast.
"""

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from movekd.cache.layout import CACHE_JSON
from movekd.cache.seal import blocks_of, entry
from movekd.cache.storage import Storage
from movekd.corpus.parquet_table import ParquetTable
from movekd.errors import CacheError, CorruptCacheError, MovekdError, shorten
from movekd.files.ownership import FileEntry

_Number = TypeVar("_Number", np.int16, np.int64)
_MAX_GROUP_ROWS = 2**20
"""Most rows of a row group, which is decoded at once; pyarrow writes no more."""
_KEY_LENGTH = 64
_CHECK_BYTES = 2**17
"""Text of keys that is checked at a time stays in the processor's cache: ten times as fast."""


def open_table(
    storage: Storage, name: str, expected: FileEntry | None, schema: pa.Schema
) -> ParquetTable:
    """Return a table, checked against what cache.json says of it.

    The same open file is checked and then read, so a later replacement does not matter. A remote
    file is first copied to a temporary file without a name.
    """
    where = f"{storage.url}/{name}"

    def damaged(reason: str) -> CorruptCacheError:
        return CorruptCacheError(
            f"{where} cannot be read ({shorten(reason)}). Run `movekd cache verify`."
        )

    file: pa.NativeFile | None = None
    try:
        if storage.local_dir is not None:
            path = storage.local_dir / name
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO waits for a writer
                raise damaged("it is no regular file")
            file = pa.OSFile(str(path))
        else:
            with tempfile.NamedTemporaryFile(prefix="movekd-") as copy:
                for block in storage.blocks(name):
                    copy.write(block)
                copy.flush()
                file = pa.OSFile(copy.name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise CacheError(f"{where} cannot be read: {error.strerror or error}.") from None
    size = file.size() if file is not None else 0
    # the size first: a file that grows for ever has no checksum
    is_sized = file is not None and expected is not None and size == expected.size_bytes
    if file is None or not is_sized or entry(blocks_of(file)) != expected:
        raise CorruptCacheError(
            f"{where} has {size or 'no'} bytes; {CACHE_JSON} lists "
            f"{expected.size_bytes if expected else 'no such file'} with another checksum. If a "
            "build was interrupted, run it again."
        )
    table = _Table(file, damaged)
    if not table.schema.equals(schema):
        columns = ", ".join(f"{shorten(field.name, 50)} {field.type}" for field in table.schema)
        needed = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise damaged(f"it holds {shorten(columns, 500) or 'no column'}; expected {needed}")
    metadata = pq.ParquetFile(file).metadata
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if not all(0 <= count <= _MAX_GROUP_ROWS for count in groups) or len(table) > size:
        raise damaged(f"it claims {len(table):,} rows in {size:,} bytes")  # keys take 64 bytes each
    return table


class _Table(ParquetTable):
    """One of the two tables. Values are checked when they are decoded, which opening does not do.

    Keys name files and end in messages, so a stranger could write a path into them.
    """

    def __init__(self, file: pa.NativeFile, damaged: Callable[[str], MovekdError]) -> None:
        super().__init__(file, damaged, may_have_nulls=False)
        self._with_keys: set[int] = set()  # row groups whose keys were checked

    def _read(
        self, groups: Sequence[int], columns: Sequence[str] | None, encoded: Sequence[str] = ()
    ) -> pa.Table:
        table = super()._read(groups, columns, encoded)
        if "key" in table.schema.names and not self._with_keys.issuperset(groups):
            if not _are_keys(table["key"]):
                raise self._damaged("it lists keys that are no SHA-256 in lower-case hex")
            self._with_keys.update(groups)
        return table


def numbers(column: pa.ChunkedArray, dtype: type[_Number]) -> npt.NDArray[_Number]:
    """Return a column of numbers without nulls. ``np.asarray`` would import pandas."""
    parts = [np.empty(0, dtype)]
    for chunk in filter(len, column.chunks):
        start = chunk.offset * parts[0].itemsize
        parts.append(np.frombuffer(chunk.buffers()[1], dtype, len(chunk), start))
    return np.concatenate(parts)


def key_lines(column: pa.ChunkedArray) -> tuple[memoryview, npt.NDArray[np.int64]]:
    """Return ``lines`` of a column of keys, which are known to have one length."""
    text = np.full((len(column), _KEY_LENGTH + 1), ord("\n"), np.uint8)
    start = 0
    for chunk in column.chunks:
        _, raw_offsets, raw = chunk.buffers()
        first = int(np.frombuffer(raw_offsets, np.int32)[chunk.offset]) if len(chunk) else 0
        size = len(chunk) * _KEY_LENGTH
        keys = np.frombuffer(raw or b"", np.uint8)[first : first + size]
        text[start : start + len(chunk), :-1] = keys.reshape(len(chunk), _KEY_LENGTH)
        start += len(chunk)
    return text.reshape(-1).data, np.arange(len(column) + 1) * (_KEY_LENGTH + 1)


def _are_keys(column: pa.ChunkedArray) -> bool:
    """Return whether all strings are 64 lower-case hex digits; a regex takes much longer."""
    for chunk in column.chunks:
        _, raw_offsets, raw = chunk.buffers()
        offsets = np.frombuffer(raw_offsets, np.int32)[chunk.offset :][: len(chunk) + 1]
        if (np.diff(offsets) != _KEY_LENGTH).any():
            return False
        text = np.frombuffer(raw or b"", np.uint8)[offsets[0] : offsets[-1]]
        for start in range(0, len(text), _CHECK_BYTES):
            some = text[start : start + _CHECK_BYTES]
            is_hex = (some - ord("0") < 10) | (some - ord("a") < 6)  # uint8 wraps around
            if not np.all(is_hex):
                return False
    return True
