"""Read the rows of a Parquet file of images and conversations, as hubs publish them.

Input: a file. Output: ``ParquetRow`` objects, a few megabytes of them at a time. Columns:

    image           struct<bytes, path>, or bytes        LLaVA-OneVision-Data, LLaVA-NeXT-Data
    images          a list of these                      FineVision, The Cauldron
    conversations   list of from and value               LLaVA-OneVision-Data, LLaVA-NeXT-Data
                    list of role and content
    texts           list of user and assistant           FineVision, The Cauldron
    id              string or integer; may be missing    LLaVA-OneVision-Data, LLaVA-NeXT-Data

A path is only a name: no file is opened for it.

Source: the dataset cards of lmms-lab/LLaVA-OneVision-Data, lmms-lab/LLaVA-NeXT-Data,
HuggingFaceM4/FineVision and HuggingFaceM4/the_cauldron; for the struct of an image,
huggingface/datasets src/datasets/features/image.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from movekd.corpus.media import promises_media, unknown_media
from movekd.corpus.parquet_table import open_parquet
from movekd.errors import ConfigError, CorpusError, printable, shorten

_MAX_BATCH_ROWS = 4096
_TURNS = (
    ("conversations", {"from", "value"}),
    ("conversations", {"role", "content"}),
    ("texts", {"user", "assistant"}),
)
"""Column of the conversations -> what a turn, or a question with its answer, consists of."""


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
class ParquetColumns:
    """Which columns of a file are read, and as what.

    Attributes:
        image: column of the images; None in a file of text only.
        turns: column of the conversations.
        is_pairs: whether that holds questions with their answers, which have no ``<image>``.
        id: column of the ids, or None.
        unused: the other columns, and the other fields of the conversations.
        media: those of ``unused`` whose names promise media. A row that has them is about what
            movekd does not see, as an entry of LLaVA's JSON with such keys.
    """

    image: str | None
    turns: str
    is_pairs: bool
    id: str | None
    unused: tuple[str, ...]
    media: tuple[str, ...]

    @property
    def used(self) -> list[str]:
        """The columns that become part of the corpus."""
        return [name for name in (self.id, self.image, self.turns) if name is not None]


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


def find_columns(schema: pa.Schema, where: str) -> ParquetColumns:
    """Return which columns of a file are read.

    Args:
        schema: the file's schema.
        where: the file's name, for errors.

    Raises:
        ConfigError: conversations are under none of the known columns or under two, or bytes are
            only under others.
    """
    kinds = dict(zip(schema.names, schema.types, strict=True))
    named = {name: kinds[name] for name in ("image", "images") if name in kinds}
    images = [name for name, kind in named.items() if not _is_null(kind)]
    turns = {name for name, parts in _TURNS if parts <= _texts(kinds.get(name))}
    has_bytes = any(map(_holds_bytes, kinds.values()))
    is_lost = not all(_is_image(kinds[name]) for name in images) or (has_bytes and not images)
    if len(turns) != 1 or len(images) > 1 or is_lost:
        found = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ConfigError(
            f"{where} has the columns {shorten(found, 600)}; expected conversations under one of "
            "conversations (a list of from and value, or of role and content) and texts (a list of "
            "user and assistant), and image bytes under one of image and images. Rename the "
            "columns, or leave the file out."
        )
    column = turns.pop()
    image = images[0] if images else None
    identity = next((name for name in ("id", "sample_id") if _is_id(kinds.get(name))), None)
    others = [name for name in kinds if name not in (image, column, identity)]
    media = [n for n in others if (promises_media(n) if image else unknown_media({n: "x"}))]
    known = set[str]().union(*(parts for name, parts in _TURNS if name == column))
    fields = sorted(set(_fields(kinds[column])) - known)
    return ParquetColumns(
        image=image,
        turns=column,
        is_pairs=column == "texts",
        id=identity,
        unused=(*others, *(f"{column}.{name}" for name in fields)),
        media=tuple(media),
    )


def _read_row(record: pa.RecordBatch, number: int, columns: ParquetColumns) -> ParquetRow:
    """Return the row of a batch that has one."""
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
    is_list = _is_list(column.type)
    values = column.flatten() if is_list else column
    if not pa.types.is_struct(values.type):
        cells = [ImageCell(data, None) for data in values.to_pylist()]
    else:
        paths: list[str | None] = [None] * len(values)
        if _is_text(_fields(values.type).get("path")):
            paths = list(map(_text, pc.struct_field(values, "path")))
        cells = list(map(ImageCell, pc.struct_field(values, "bytes").to_pylist(), paths))
    # A row of text only has a null in a column of single images. A null in a list is a lost image.
    return [cell for cell in cells if is_list or cell != (None, None)]


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


def _is_null(kind: pa.DataType) -> bool:
    """Return whether a type has no values: a column of a subset without images."""
    return bool(pa.types.is_null(kind.value_type if _is_list(kind) else kind))


def _is_list(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_id(kind: pa.DataType | None) -> bool:
    return _is_text(kind) or (kind is not None and pa.types.is_integer(kind))


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_image(kind: pa.DataType | None) -> bool:
    """Return whether a type is that of an image, or of a list of images."""
    value = kind.value_type if kind is not None and _is_list(kind) else kind
    return _is_bytes(value) or (not _is_list(value) and _is_bytes(_fields(value).get("bytes")))


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return whether bytes stand in a type, in a struct or list of it too."""
    return _is_bytes(kind) or any(map(_holds_bytes, _fields(kind).values()))


def _texts(kind: pa.DataType | None) -> set[str]:
    """Return the fields of text of the structs in a list."""
    fields = _fields(kind) if _is_list(kind) else {}
    return {name for name, inner in fields.items() if _is_text(inner)}


def _fields(kind: pa.DataType | None) -> dict[str, pa.DataType]:
    """Return the fields of a struct or of the structs in a list; of other lists, their values."""
    if kind is None or not (_is_list(kind) or pa.types.is_struct(kind)):
        return {}
    struct = kind.value_type if _is_list(kind) else kind
    if not pa.types.is_struct(struct):
        return {"element": struct}
    return {field.name: field.type for field in struct}
