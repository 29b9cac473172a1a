"""Tests of movekd.corpus.parquet_columns."""

import pyarrow as pa
import pytest

from movekd.corpus.parquet_columns import find_columns
from movekd.errors import ConfigError
from parquet_kit import IMAGE, SCHEMAS


def conversations(*names, kind=None):
    return pa.list_(pa.struct([(name, kind or pa.string()) for name in names]))


def test_the_columns_of_published_data_sets_are_understood():
    found = {name: find_columns(schema, name) for name, schema in SCHEMAS.items()}
    used = {name: columns.used for name, columns in found.items()}
    llava = ["id", "image", "conversations"]
    fine = ["images", "texts"]
    assert list(used.values()) == [llava, llava, fine, fine]
    assert [columns.is_pairs for columns in found.values()] == [False, False, True, True]
    assert found["LLaVA-OneVision-Data"].unused == ("data_source",)
    assert found["The Cauldron"].unused == ("texts.source",)
    assert "image_correspondence_ratings" in found["FineVision"].unused
    assert not any(columns.media for columns in found.values())


@pytest.mark.parametrize(
    ("columns", "used"),
    [
        ({"image": pa.binary(), "conversations": conversations("from", "value")}, 2),
        ({"image": pa.list_(pa.large_binary()), "texts": conversations("user", "assistant")}, 2),
        ({"images": pa.large_list(IMAGE), "conversations": conversations("role", "content")}, 2),
        ({"sample_id": pa.int64(), "conversations": conversations("from", "value")}, 2),
        ({"image": pa.null(), "conversations": conversations("from", "value")}, 1),
        ({"images": pa.list_(pa.null()), "texts": conversations("user", "assistant")}, 1),
    ],
)
def test_other_forms_of_these_columns_are_understood(columns, used):
    assert len(find_columns(pa.schema(columns), "a.parquet").used) == used


TURNS = conversations("from", "value")


@pytest.mark.parametrize(
    "columns",
    [
        {"image": IMAGE},
        {"image": IMAGE, "caption": pa.string()},
        {"image": IMAGE, "conversations": pa.string()},
        {"image": IMAGE, "conversations": conversations("from", "text")},
        {"image": IMAGE, "conversations": conversations("role", "content", kind=pa.int8())},
        {"image": IMAGE, "conversations": TURNS, "texts": conversations("user", "assistant")},
        {"image": IMAGE, "images": pa.list_(IMAGE), "conversations": TURNS},
        {"image": pa.string(), "conversations": TURNS},  # a path: no image would be in the file
        {"image": pa.struct([("path", pa.string())]), "conversations": TURNS},
        {"images": pa.list_(pa.list_(IMAGE)), "conversations": TURNS},
        {"jpg": pa.binary(), "conversations": TURNS},  # would be a corpus of text only
        {"photo": pa.list_(IMAGE), "conversations": TURNS},
    ],
)
def test_other_columns_are_refused_by_name(columns):
    with pytest.raises(ConfigError, match=r"a\.parquet has the columns .*Rename") as caught:
        find_columns(pa.schema(columns), "a.parquet")
    assert all(f"{name}: " in str(caught.value) for name in columns)


def test_columns_of_other_media_are_watched():
    video = find_columns(
        SCHEMAS["LLaVA-OneVision-Data"].append(pa.field("video", pa.string())), "a"
    )
    assert (video.media, video.unused) == (("video",), ("data_source", "video"))
    text = {"id": pa.string(), "image_id": pa.int64(), "size": pa.int64(), "conversations": TURNS}
    assert find_columns(pa.schema(text), "a").media == ("image_id",)
