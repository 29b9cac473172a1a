"""Look up rows in a Parquet table of ten million rows without holding it in memory.

``corpus.index`` and ``cache.catalog`` open index.parquet and names.parquet this way. A look-up
decodes a few row groups at a time and drops them. That is faster than keeping the column, because
touching new memory costs more than decoding. No row becomes a Python object.
"""

import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from movekd.errors import MovekdError, shorten
from movekd.threads import num_cpus

PART_ROWS = 1 << 17
"""Rows that are decoded at a time, and rows per row group that is written."""
_MAX_THREADS = 4
_MAX_EXPANSION, _FREE_BYTES = 100, 1 << 24
"""A file may expand to 16 MiB, and beyond that to 100 times its size: that of ``write_parquet``
expands to less than 10 times."""
_STREAM_BYTES = 1 << 20
_Result = TypeVar("_Result")


class ParquetTable:
    """A Parquet file, read a few row groups at a time. Thread-safe; usable after a fork.

    A stranger may have written the file: what its metadata announce is bounded by its size before
    any memory is taken, and what is decoded must have the announced length.

    Args:
        file: the open file. Reads name a position, so threads and forks can share it.
        damaged: turns the reason why the file cannot be read into an error.
        columns: columns to use. Default: all.
        min_row_bytes: bytes of the file that a row takes at least. A column of distinct SHA-256
            takes 32, however it is encoded.
        may_have_nulls: whether values may be null. If not, reading one is an error.

    Attributes:
        schema: schema of these columns.
    """

    def __init__(
        self,
        file: pa.NativeFile,
        damaged: Callable[[str], MovekdError],
        columns: Sequence[str] | None = None,
        *,
        min_row_bytes: int = 1,
        may_have_nulls: bool = True,
    ) -> None:
        self._file, self._damaged, self._may_have_nulls = file, damaged, may_have_nulls
        try:
            parquet = pq.ParquetFile(file)
            self._metadata, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
            self.schema = pa.schema([schema.field(name) for name in columns or schema.names])
            size_bytes = file.size()
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise damaged(_reason(error)) from None
        groups = [self._metadata.row_group(at) for at in range(self._metadata.num_row_groups)]
        counts, expanded = [g.num_rows for g in groups], [g.total_byte_size for g in groups]
        if min(counts, default=0) < 0 or sum(counts) * min_row_bytes > size_bytes:
            raise damaged(f"it announces {sum(counts):,} rows in {size_bytes:,} bytes")
        if min(expanded, default=0) < 0 or sum(expanded) > max(
            _FREE_BYTES, _MAX_EXPANSION * size_bytes
        ):
            raise damaged(f"its {size_bytes:,} bytes expand to {sum(expanded):,}")
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, column: str) -> pa.ChunkedArray:
        return self.read([column])[column]

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the whole table, or whole columns."""
        return self._valid(self._read(range(len(self._starts) - 1), columns))

    def slice(
        self,
        start: int,
        length: int | None = None,
        columns: Sequence[str] | None = None,
        encoded: Sequence[str] = (),
    ) -> pa.Table:
        """Return up to ``length`` rows from ``start``.

        Args:
            start: the first row.
            length: number of rows. Default: up to the end.
            columns: columns to return. Default: all.
            encoded: columns of few distinct strings, returned as Arrow dictionaries, as they lie in
                the file.
        """
        end = len(self) if length is None else min(start + length, len(self))
        if end <= start:
            return self._read([], columns, encoded)  # no row, but the columns
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        last = int(np.searchsorted(self._starts, end, "left"))
        table = self._read(range(first, last), columns, encoded)
        return self._valid(table.slice(start - int(self._starts[first]), end - start))

    def group_around(self, row: int) -> tuple[int, int]:
        """Return the first row of the row group that holds ``row``, and the row after its last."""
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        return int(self._starts[group]), int(self._starts[group + 1])

    def parts(
        self, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """Yield the table in parts of ``PART_ROWS`` rows; see ``slice``."""
        for start in range(0, len(self), PART_ROWS):
            yield self.slice(start, PART_ROWS, columns, encoded)

    def records(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows one by one, each as a batch; text may be no UTF-8.

        Memory holds one row and one page of each column, however large a row group is.
        """
        at = 0
        try:
            parquet = pq.ParquetFile(
                self._file, metadata=self._metadata, pre_buffer=False, buffer_size=_STREAM_BYTES
            )
            for batch in parquet.iter_batches(1, columns=list(columns), use_threads=False):
                at += len(batch)
                yield batch
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise self._damaged(f"row {at:,}: {_reason(error)}") from None
        if at != len(self):
            raise self._damaged(f"it announces {len(self):,} rows and holds {at:,}")

    def equals(self, other: "ParquetTable") -> bool:
        """Return whether two tables have equal rows."""
        if not (self.schema.equals(other.schema) and len(self) == len(other)):
            return False
        return all(a.equals(b) for a, b in zip(self.parts(), other.parts(), strict=True))

    def find(self, column: str, asked: Any) -> NDArray[np.int64]:
        """Return the first row of each string of ``asked`` in a column, -1 for an unknown one.

        Arrow hashes ``asked``, not the column, which is three to ten times faster on millions of
        rows. It does so for each part, so a part is no smaller than ``asked``.
        """
        distinct = asked.unique()

        def search(groups: range) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
            matches = pc.index_in(self._read(groups, [column])[column], value_set=distinct)
            if matches.null_count == len(matches):
                return np.empty(0, np.int64), np.empty(0, np.int32)
            places = np.flatnonzero(np.asarray(pc.is_valid(matches)))
            return places + self._starts[groups.start], np.asarray(pc.drop_null(matches))

        first = np.full(len(distinct), -1, np.int64)
        for places, which in reversed(self._each_part(search, len(distinct))):
            first[which[::-1]] = places[::-1]  # the first of equal ones wins
        return np.asarray(first[np.asarray(pc.index_in(asked, value_set=distinct))], np.int64)

    def take(self, column: str, places: NDArray[np.int64]) -> pa.ChunkedArray:
        """Return the values of a column in some rows, in the order of ``places``; null for -1."""
        order = np.argsort(places, kind="stable")
        ascending = places[order]

        def pick(groups: range) -> list[pa.Array]:
            start, end = self._starts[groups.start], self._starts[groups.stop]
            low, high = np.searchsorted(ascending, [start, end])
            if low == high:
                return []
            values = self._read(groups, [column])[column]
            return list(values.take(pa.array(ascending[low:high] - start)).chunks)

        kind = self.schema.field(column).type
        chunks = [pa.nulls(int(np.searchsorted(ascending, 0)), kind)]
        for found in self._each_part(pick, 0):
            chunks += found
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.chunked_array(chunks, kind).take(pa.array(back))

    def _valid(self, table: pa.Table) -> pa.Table:
        """Return a table for callers outside; refuse text that is no UTF-8."""
        try:
            table.validate(full=True)
        except pa.ArrowException as error:
            raise self._damaged(_reason(error)) from None
        return table

    def _each_part(self, do: Callable[[range], _Result], min_rows: int) -> list[_Result]:
        """Return the results of ``do`` for ranges of row groups, in order; runs a few threads."""
        parts, first, size = [], 0, max(min_rows, PART_ROWS)
        for group in range(1, len(self._starts)):
            if group == len(self._starts) - 1 or self._starts[group] - self._starts[first] >= size:
                parts.append(range(first, group))
                first = group
        num_threads = min(_MAX_THREADS, num_cpus(), len(parts))
        if num_threads < 2:
            return [do(part) for part in parts]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(do, parts))

    def _read(
        self, groups: Sequence[int], columns: Sequence[str] | None, encoded: Sequence[str] = ()
    ) -> pa.Table:
        wanted = list(columns or self.schema.names)
        if not groups:  # pyarrow 18 fails at a file without a row group
            fields = [self.schema.field(name) for name in wanted]
            return pa.schema(
                f.with_type(pa.dictionary(pa.int32(), f.type)) if f.name in encoded else f
                for f in fields
            ).empty_table()
        try:
            parquet = pq.ParquetFile(
                self._file, metadata=self._metadata, read_dictionary=list(encoded)
            )
            table = parquet.read_row_groups(list(groups), wanted, use_threads=False)
            table = table.select(wanted).replace_schema_metadata(None)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise self._damaged(_reason(error)) from None
        expected = sum(int(self._starts[group + 1] - self._starts[group]) for group in groups)
        if len(table) != expected:
            raise self._damaged(f"it announces {expected:,} rows and holds {len(table):,}")
        if not self._may_have_nulls and any(column.null_count for column in table.columns):
            raise self._damaged("a value is null")
        return table


def open_parquet(
    path: Path,
    damaged: Callable[[str], MovekdError],
    columns: Sequence[str] | None = None,
    *,
    min_row_bytes: int = 1,
    may_have_nulls: bool = True,
) -> ParquetTable:
    """Open a Parquet file; raise ``damaged(reason)`` if it cannot be read. See ``ParquetTable``."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO waits for a writer
            raise damaged("it is no regular file")
        file = pa.OSFile(str(path))
    except OSError as error:
        raise damaged(_reason(error)) from None
    return ParquetTable(
        file, damaged, columns, min_row_bytes=min_row_bytes, may_have_nulls=may_have_nulls
    )


def write_parquet(sink: Any, parts: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write a table that ``ParquetTable`` reads fast. The same parts give the same bytes.

    Keys, offsets and sizes look random: a dictionary or snappy saves little and makes reading them
    two to five times slower. Shards, views and image sizes have few distinct values.
    """
    few = [name for name in schema.names if name in ("shard", "view", "width", "height")]
    packed = {name: "snappy" if name in (*few, "name") else "none" for name in schema.names}
    with pq.ParquetWriter(sink, schema, use_dictionary=few, compression=packed) as writer:
        for part in parts:
            writer.write_table(part, row_group_size=PART_ROWS)


def lines(*columns: pa.ChunkedArray) -> tuple[memoryview, NDArray[np.int32]]:
    """Return the rows as lines of text, columns separated by a space, and the start of each line.

    The starts have one more entry, the end of the last line. The text must be below 2 GiB, the
    limit of Arrow's int32 offsets.
    """
    parts = [column.combine_chunks().cast(pa.string()) for column in columns]
    text = pc.binary_join_element_wise(*parts, " ") if len(parts) > 1 else parts[0]
    text = pc.binary_join_element_wise(text, "", "\n")
    _, offsets, content = text.buffers()
    starts = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    return memoryview(content if content is not None else b""), starts


def _reason(error: Exception) -> str:
    return shorten((str(error).splitlines() or [type(error).__name__])[0])
