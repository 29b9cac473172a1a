"""Tests of movekd.corpus.parquet_table against the same table in memory."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.corpus import parquet_table
from movekd.corpus.parquet_table import ParquetTable, lines, open_parquet, write_parquet
from movekd.errors import CorpusError

texts = st.text(st.characters(codec="utf-8"), max_size=5)
rows = st.lists(st.tuples(texts, st.integers(-(2**31), 2**31 - 1)), max_size=40)
quick = settings(max_examples=60, deadline=None)


def stored(table: pa.Table, **how) -> ParquetTable:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **how)
    return ParquetTable(pa.BufferReader(sink.getvalue()), CorpusError)


def table_of(content) -> pa.Table:
    names, numbers = [name for name, _ in content], [number for _, number in content]
    return pa.table({"name": pa.array(names, pa.string()), "number": pa.array(numbers, pa.int64())})


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch) -> None:
    monkeypatch.setattr(parquet_table, "PART_ROWS", 7)


@quick
@given(rows, st.integers(1, 11), st.integers(0, 45), st.integers(0, 45))
def test_slices_and_parts_are_those_of_the_table(content, group, start, length) -> None:
    table = table_of(content)
    found = stored(table, row_group_size=group)
    assert len(found) == len(table)
    assert found.read().equals(table)
    assert found["number"].equals(table["number"])
    assert found.slice(start, length, ["name"]).equals(table.slice(start, length).select(["name"]))
    assert found.slice(start).equals(table.slice(start))
    parts = list(found.parts())
    assert [len(part) for part in parts[:-1]] == [7] * (len(parts) - 1)
    assert pa.concat_tables([table.slice(0, 0), *parts]).equals(table)
    for part, encoded in zip(parts, found.parts(encoded=["name"]), strict=True):
        assert pa.types.is_dictionary(encoded["name"].type)
        assert encoded["name"].to_pylist() == part["name"].to_pylist()


@quick
@given(rows, st.integers(1, 11), st.lists(texts, max_size=12))
def test_finding_is_looking_for_the_first(content, group, asked) -> None:
    table = table_of(content)
    names = table["name"].to_pylist()
    asked = [*asked, *names[::3], *names[:2]]
    found = stored(table, row_group_size=group).find("name", pa.array(asked, pa.string()))
    assert found.tolist() == [names.index(name) if name in names else -1 for name in asked]


@quick
@given(rows, st.integers(1, 11), st.data())
def test_taking_is_indexing_with_null_for_nowhere(content, group, data) -> None:
    table = table_of(content)
    places = data.draw(st.lists(st.integers(-1, len(table) - 1), max_size=20))
    found = stored(table, row_group_size=group).take("name", np.array(places, np.int64))
    names = table["name"].to_pylist()
    assert found.to_pylist() == [None if place < 0 else names[place] for place in places]


@quick
@given(rows, rows, st.integers(1, 11), st.integers(1, 11))
def test_tables_are_equal_however_they_are_cut(first, second, one, other) -> None:
    tables = table_of(first), table_of(second)
    found = stored(tables[0], row_group_size=one), stored(tables[1], row_group_size=other)
    assert found[0].equals(found[1]) == tables[0].equals(tables[1])
    assert found[0].equals(stored(tables[0], row_group_size=other))


@pytest.mark.parametrize("place", [None, 0, 9, 19])
def test_a_null_is_damage_where_none_may_be(place) -> None:
    numbers = [None if at == place else at for at in range(20)]
    sink = pa.BufferOutputStream()
    table = pa.table({"other": range(20), "number": pa.array(numbers, pa.int64())})
    pq.write_table(table, sink, row_group_size=6)
    file = pa.BufferReader(sink.getvalue())
    assert ParquetTable(file, CorpusError).read().equals(table)
    strict = ParquetTable(file, CorpusError, may_have_nulls=False)
    assert len(strict.read(["other"])) == 20
    if place is None:
        assert strict.read().equals(table)
    else:
        with pytest.raises(CorpusError, match="a value is null"):
            strict.read()


@quick
@given(st.lists(st.tuples(texts, st.integers(0, 99)), min_size=1, max_size=20), st.integers(0, 19))
def test_lines_are_rows_of_text(content, start) -> None:
    table = table_of(content).slice(min(start, len(content) - 1))
    text, starts = lines(table["name"], table["number"])
    expected = [f"{row['name']} {row['number']}\n".encode() for row in table.to_pylist()]
    cut = [bytes(text[a:b]) for a, b in itertools.pairwise(starts)]
    assert cut == expected


@quick
@given(rows, st.integers(1, 11))
def test_what_is_written_in_parts_is_read_and_equal_parts_are_equal_bytes(content, size) -> None:
    table = table_of(content)
    sinks = []
    for _ in range(2):
        sinks.append(pa.BufferOutputStream())
        parts = (table.slice(start, size) for start in range(0, len(table), size))
        write_parquet(sinks[-1], parts, table.schema)
    first, second = (bytes(sink.getvalue()) for sink in sinks)
    assert first == second
    assert ParquetTable(pa.BufferReader(first), CorpusError).read().equals(table)


def test_a_damaged_file_is_what_the_caller_says(tmp_path: Path) -> None:
    def damaged(reason: str) -> CorpusError:
        return CorpusError(f"it is damaged: {reason}")

    path = tmp_path / "a.parquet"
    with pytest.raises(CorpusError, match=r"it is damaged: .*No such file"):
        open_parquet(path, damaged)
    pq.write_table(table_of([("a", 1)] * 50), path)
    with pytest.raises(CorpusError, match=r"it is damaged: .*colour"):
        open_parquet(path, damaged, ["colour"])
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(CorpusError, match="it is damaged"):
        open_parquet(path, damaged)
    path.write_bytes(bytes(200) + whole[200:])  # the footer is whole
    with pytest.raises(CorpusError, match="it is damaged"):
        open_parquet(path, damaged).read()
