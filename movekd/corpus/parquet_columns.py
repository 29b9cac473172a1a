"""Find the columns of a Parquet file that hold images and conversations, as hubs publish them.

Input: a file's schema. Output: ``ParquetColumns``. Understood are:

    image           struct<bytes, path>, or bytes        LLaVA-OneVision-Data, LLaVA-NeXT-Data
    images          a list of these                      FineVision, The Cauldron
    conversations   list of from and value               LLaVA-OneVision-Data, LLaVA-NeXT-Data
                    list of role and content
    texts           list of user and assistant           FineVision, The Cauldron
    id              string or integer; may be missing    LLaVA-OneVision-Data, LLaVA-NeXT-Data

Source: the dataset cards of lmms-lab/LLaVA-OneVision-Data, lmms-lab/LLaVA-NeXT-Data,
HuggingFaceM4/FineVision and HuggingFaceM4/the_cauldron, and huggingface/nanoVLM, which reads the
last two; for the struct of an image, huggingface/datasets src/datasets/features/image.py.
"""

from dataclasses import dataclass

import pyarrow as pa

from movekd.corpus.media import promises_media, unknown_media
from movekd.errors import ConfigError, shorten

_TURNS = (
    ("conversations", {"from", "value"}),
    ("conversations", {"role", "content"}),
    ("texts", {"user", "assistant"}),
)
"""Column of the conversations -> what a turn, or a question with its answer, consists of."""


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
    fields = sorted(set(fields_of(kinds[column])) - known)
    return ParquetColumns(
        image=image,
        turns=column,
        is_pairs=column == "texts",
        id=identity,
        unused=(*others, *(f"{column}.{name}" for name in fields)),
        media=tuple(media),
    )


def _is_null(kind: pa.DataType) -> bool:
    """Return whether a type has no values: a column of a subset without images."""
    return bool(pa.types.is_null(kind.value_type if is_list(kind) else kind))


def is_list(kind: pa.DataType | None) -> bool:
    """Return whether a type is a list."""
    return kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind))


def is_text(kind: pa.DataType | None) -> bool:
    """Return whether a type is text."""
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_id(kind: pa.DataType | None) -> bool:
    return is_text(kind) or (kind is not None and pa.types.is_integer(kind))


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_image(kind: pa.DataType | None) -> bool:
    """Return whether a type is that of an image, or of a list of images."""
    value = kind.value_type if kind is not None and is_list(kind) else kind
    return _is_bytes(value) or (not is_list(value) and _is_bytes(fields_of(value).get("bytes")))


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return whether bytes stand in a type, in a struct or list of it too."""
    return _is_bytes(kind) or any(map(_holds_bytes, fields_of(kind).values()))


def _texts(kind: pa.DataType | None) -> set[str]:
    """Return the fields of text of the structs in a list."""
    fields = fields_of(kind) if is_list(kind) else {}
    return {name for name, inner in fields.items() if is_text(inner)}


def fields_of(kind: pa.DataType | None) -> dict[str, pa.DataType]:
    """Return the fields of a struct or of the structs in a list; of other lists, their values."""
    if kind is None or not (is_list(kind) or pa.types.is_struct(kind)):
        return {}
    struct = kind.value_type if is_list(kind) else kind
    if not pa.types.is_struct(struct):
        return {"element": struct}
    return {field.name: field.type for field in struct}
