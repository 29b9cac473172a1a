"""Read the rows of a Parquet file of images and conversations.

Input: a file whose columns ``parquet_columns`` understands. Output: ``ParquetRow`` objects, a few
megabytes of them at a time. The path of an image is only a name: no file is opened for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from movekd.corpus.parquet_columns import (
    ParquetColumns,
    fields_of,
    find_columns,
    is_list,
    is_text,
)
from movekd.corpus.parquet_table import open_parquet
from movekd.errors import ConfigError, CorpusError, printable

_MAX_BATCH_ROWS = 4096
_MAX_LENGTH = 1 << 16
"""Most images or turns of a row: a stranger's file of few bytes can announce millions of nulls."""


class DamagedRowsError(CorpusError):
    """A Parquet file cannot be read to its end; the message is only the reason."""


class ImageCell(NamedTuple):
    """An image of a row: its bytes, and what the file calls it. Either may be None."""

    data: bytes | None
    path: str | None


@dataclass(frozen=True)
class ParquetRow:
    """A row, not checked yet.

    Attributes:
        number: its place in the file, from 0.
        size_bytes: bytes of its columns that are read.
        id: its id, or None.
        images: its images, in order.
        turns: what stands under the conversations, in the form of LLaVA's JSON.
        media: columns of other media that are not empty -> a word in place of the value.
        is_utf8: whether id and turns are; if not, they are None.
    """

    number: int
    size_bytes: int
    id: Any
    images: list[ImageCell]
    turns: Any
    media: dict[str, str]
    is_utf8: bool


@dataclass(frozen=True)
class ParquetSource:
    """A Parquet file whose columns are understood.

    Attributes:
        label: what reports and names of images call it.
        path: the file.
        columns: which columns are read.
        num_rows: how many rows it announces.
    """

    label: str
    path: Path
    columns: ParquetColumns
    num_rows: int

    def batches(self, max_bytes: int) -> Iterator[list[ParquetRow]]:
        """Yield the rows in lists of at most ``max_bytes``, or of one row that is larger.

        Raises:
            DamagedRowsError: after the rows before the damage.
        """
        rows = self._rows()
        batch: list[ParquetRow] = []
        damage: DamagedRowsError | None = None
        size = 0
        while True:
            try:
                row = next(rows, None)
            except DamagedRowsError as error:
                row, damage = None, error
            is_full = row is None or size + row.size_bytes > max_bytes
            if batch and (is_full or len(batch) == _MAX_BATCH_ROWS):
                yield batch
                batch, size = [], 0
            if row is None:
                break
            batch.append(row)
            size += row.size_bytes
        if damage is not None:
            raise damage

    def _rows(self) -> Iterator[ParquetRow]:
        table = open_parquet(self.path, DamagedRowsError)
        names = [*self.columns.used, *self.columns.media]
        for number, record in enumerate(table.records(names)):
            yield _read_row(record, number, self.columns)


def open_source(path: Path, label: str) -> ParquetSource:
    """Return a Parquet file after a look at its columns; reads no row.

    Raises:
        ConfigError: it is no Parquet file that can be read, or its columns are not understood.
    """

    def damaged(reason: str) -> ConfigError:
        return ConfigError(
            f"{printable(path)} cannot be read as Parquet ({reason}); expected a whole .parquet "
            "file. Download it again (a file of some hundred bytes is a pointer of Git LFS), or "
            "leave it out."
        )

    table = open_parquet(path, damaged)
    return ParquetSource(label, path, find_columns(table.schema, printable(path)), len(table))


def _read_row(record: pa.RecordBatch, number: int, columns: ParquetColumns) -> ParquetRow:
    """Return the row of a batch that has one."""
    for name in columns.used:
        column = record.column(name)
        if is_list(column.type) and len(column.flatten()) > _MAX_LENGTH:
            raise DamagedRowsError(f"row {number:,}: {name} has more than {_MAX_LENGTH:,} values")
    images = [] if columns.image is None else _read_images(record.column(columns.image))
    media = {name: "x" for name in columns.media if _is_there(record.column(name)[0])}
    identity, turns, is_utf8 = None, None, True
    try:
        identity = None if columns.id is None else record.column(columns.id)[0].as_py()
        turns = record.column(columns.turns)[0].as_py()
        if columns.is_pairs and turns is not None:
            turns = [turn for pair in turns for turn in _split_pair(pair)]
    except UnicodeDecodeError:
        identity, turns, is_utf8 = None, None, False
    return ParquetRow(number, record.nbytes, identity, images, turns, media, is_utf8)


def _read_images(column: pa.Array) -> list[ImageCell]:
    """Return the images in a column of one row."""
    is_many = is_list(column.type)
    values = column.flatten() if is_many else column
    if not pa.types.is_struct(values.type):
        cells = [ImageCell(data, None) for data in values.to_pylist()]
    else:
        paths: list[str | None] = [None] * len(values)
        if is_text(fields_of(values.type).get("path")):
            paths = list(map(_text, pc.struct_field(values, "path")))
        cells = list(map(ImageCell, pc.struct_field(values, "bytes").to_pylist(), paths))
    # A row of text only has a null in a column of single images. A null in a list is a lost image.
    return [cell for cell in cells if is_many or cell != (None, None)]


def _split_pair(pair: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a question with its answer as two turns of LLaVA's JSON."""
    pair = pair or {}
    return [
        {"from": "human", "value": pair.get("user")},
        {"from": "gpt", "value": pair.get("assistant")},
    ]


def _text(value: pa.Scalar) -> str | None:
    """Return a text; None if it is no UTF-8."""
    try:
        return value.as_py()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return None


def _is_there(value: pa.Scalar) -> bool:
    """Return whether a value is neither null nor empty."""
    if not value.is_valid:
        return False
    if isinstance(value, pa.StructScalar):
        return any(map(_is_there, value.values()))
    if isinstance(value, pa.ListScalar):
        return len(value) > 0
    return not isinstance(value, pa.BinaryScalar) or value.as_buffer().size > 0
