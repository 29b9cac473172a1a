"""Tests of movekd.corpus.parquet_source: batches and damage."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_files import picture
from movekd.corpus.parquet_source import DamagedRowsError, open_source
from movekd.errors import ConfigError
from parquet_kit import SCHEMAS, row_of, write_rows

MIB = 2**20
ONE = SCHEMAS["LLaVA-OneVision-Data"]


def test_what_is_no_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ConfigError, match=r"cannot be read as Parquet \(.*Git LFS"):
        open_source(path, "a")
    with pytest.raises(ConfigError, match=r"cannot be read as Parquet \(.*No such file"):
        open_source(tmp_path / "none.parquet", "a")
    os.mkfifo(tmp_path / "fifo.parquet")
    with pytest.raises(ConfigError, match="it is no regular file"):
        open_source(tmp_path / "fifo.parquet", "a")


@pytest.mark.parametrize("is_repeated", [False, True])
def test_memory_holds_a_few_rows_however_large_a_row_group_is(tmp_path, is_repeated):
    """24 rows of one MiB; repeated, their file has one MiB, because a dictionary holds it once."""
    data = [os.urandom(MIB)] * 24 if is_repeated else [os.urandom(MIB) for _ in range(24)]
    rows = [row_of(ONE, str(n), [(each, None)], [("<image>", "x")]) for n, each in enumerate(data)]
    how = {"write_batch_size": 1, "dictionary_pagesize_limit": 2 * MIB, "compression": "none"}
    path = write_rows(tmp_path / "a.parquet", ONE, rows, use_dictionary=is_repeated, **how)
    assert pq.read_metadata(path).num_row_groups == 1
    assert (path.stat().st_size < 2 * MIB) == is_repeated
    del rows
    before, seen = pa.default_memory_pool(), []
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        for batch in open_source(path, "a").batches(4 * MIB):
            assert sum(row.size_bytes for row in batch) <= 4 * MIB
            seen += [(row.number, row.images[0].data) for row in batch]
            del batch
    finally:
        pa.set_memory_pool(before)
    assert seen == list(enumerate(data))
    assert pool.max_memory() < 8 * MIB


def test_a_row_above_the_limit_is_read_by_itself(tmp_path):
    sizes = [10, 10, 9000, 10, 10, 10]
    rows = [row_of(ONE, "", [(bytes(n), None)], [("<image>", "x")]) for n in sizes]
    source = open_source(write_rows(tmp_path / "a.parquet", ONE, rows), "a")
    assert [len(batch) for batch in source.batches(1000)] == [2, 1, 3]
    assert [len(batch) for batch in source.batches(1)] == [1] * 6


def test_rows_before_a_damage_are_read(tmp_path):
    data = [picture(n, (40, 40)) for n in range(9)]
    rows = [row_of(ONE, str(n), [(each, None)], [("<image>", "x")]) for n, each in enumerate(data)]
    path = write_rows(tmp_path / "a.parquet", ONE, rows, row_group_size=3, use_dictionary=False)
    page = pq.read_metadata(path).row_group(1).column(1).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[page : page + 8] = b"\xff" * 8
    path.write_bytes(raw)
    batches = open_source(path, "a").batches(MIB)
    assert [row.images[0].data for row in next(batches)] == data[:3]
    with pytest.raises(DamagedRowsError, match="row 3: "):
        next(batches)


def test_a_row_of_endless_nulls_ends_the_file(tmp_path):
    schema = SCHEMAS["FineVision"]
    rows = [{"images": [], "texts": []}, {"images": [None] * 70_000, "texts": []}]
    source = open_source(write_rows(tmp_path / "a.parquet", schema, rows), "a")
    batches = source.batches(MIB)
    assert len(next(batches)) == 1
    with pytest.raises(DamagedRowsError, match="row 1: images has more than 65,536 values"):
        next(batches)
