"""Tests of movekd.corpus.keys."""

import hashlib
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.corpus.keys import Keys, decode_keys
from movekd.corpus.parquet_table import ParquetTable
from movekd.errors import CorpusError

KEYS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(10)]


def keys_of(column) -> Keys:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": column}), sink, row_group_size=4)
    return Keys(ParquetTable(pa.BufferReader(sink.getvalue()), CorpusError), "index.parquet")


def test_a_digest_is_the_key_in_bytes() -> None:
    keys = keys_of(KEYS)
    for row in (7, 0, 3, 9, 7):
        assert keys.digest(row) == bytes.fromhex(KEYS[row]) == keys.digest(row, anew=True)


def test_processes_that_were_forked_decode_together() -> None:
    keys = keys_of(KEYS)
    child = os.fork()
    if child == 0:
        os._exit(keys.digest(5) != bytes.fromhex(KEYS[5]))
    assert os.waitpid(child, 0)[1] == 0
    assert keys._is_known.tolist() == [0] * 4 + [1] * 4 + [0] * 2
    assert keys.digest(6) == bytes.fromhex(KEYS[6])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(KEYS), max_size=6),
    st.one_of(st.text(max_size=70), st.sampled_from(["../../a", KEYS[0].upper(), KEYS[0] + "0"])),
    st.lists(st.sampled_from(KEYS), max_size=3),
)
def test_only_64_digits_are_a_key(before, key, after) -> None:
    """In any chunk, and at any place of a slice."""
    column = pa.chunked_array([pa.array(before, pa.string()), pa.array(["x", key, *after])[1:]])
    with pytest.raises(CorpusError) as caught:
        decode_keys(column, 100, "index.parquet")
    assert f"in row {100 + len(before)}; expected a SHA-256 in 64 digits" in str(caught.value)
    assert len(str(caught.value)) < 600
    good = pa.chunked_array([pa.array(["x", *before])[1:], pa.array(after, pa.string())])
    found = decode_keys(good, 0, "index.parquet")
    assert [row.tobytes().hex() for row in found] == before + after
