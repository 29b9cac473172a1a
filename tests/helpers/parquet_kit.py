"""Parquet files with the columns that four data sets are published with, made by pyarrow."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How the library ``datasets`` stores an image."""


def _list(*names: str) -> pa.DataType:
    return pa.list_(pa.struct([(name, pa.string()) for name in names]))


_RATED = ("relevance", "visual_dependency", "image_correspondence", "formatting")
SCHEMAS = {
    "LLaVA-OneVision-Data": pa.schema(
        {
            **{"id": pa.string(), "image": IMAGE},
            **{"conversations": _list("from", "value"), "data_source": pa.string()},
        }
    ),
    "LLaVA-NeXT-Data": pa.schema(
        {
            **{"id": pa.string(), "conversations": _list("from", "value")},
            **{"data_source": pa.string(), "image": IMAGE},
        }
    ),
    "FineVision": pa.schema(
        {
            **{"images": pa.list_(IMAGE), "texts": _list("user", "assistant")},
            **{"source": pa.string()},
            **{f"{name}_ratings": pa.list_(pa.int64()) for name in _RATED},
            **{f"{name}_min": pa.int64() for name in _RATED},
        }
    ),
    "The Cauldron": pa.schema(
        {"images": pa.list_(IMAGE), "texts": _list("user", "assistant", "source")}
    ),
}
"""Data set -> the columns on its card."""

Image = tuple[bytes | None, str | None]


def write_rows(path: Path, schema: pa.Schema, rows: list[dict[str, Any]], **how: Any) -> Path:
    """Write rows; columns that a row lacks become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **how)
    return path


def row_of(
    schema: pa.Schema, id: str, images: list[Image], pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    """Return a row of a conversation, in the columns of a schema."""
    cells = [{"bytes": data, "path": path} for data, path in images]
    if "texts" in schema.names:
        texts = [{"user": user, "assistant": assistant} for user, assistant in pairs]
        return {"images": cells, "texts": texts, "relevance_ratings": [5] * len(pairs)}
    turns = [
        {"from": role, "value": text}
        for pair in pairs
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return {"id": id, "image": cells[0] if cells else None, "conversations": turns}
