import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.cache.seal import checksum, file_entry, read_sealed, write_atomic, write_sealed
from movekd.errors import CacheError, CorruptCacheError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "xxh3_128"), json_values, max_size=4))
def test_what_was_sealed_is_read_and_equal_content_is_equal_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("seal") / "a.json"
    write_sealed(path, content)
    first = path.read_bytes()
    assert read_sealed(path) == content
    write_sealed(path, dict(reversed(list(content.items()))))
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == ["a.json"]


def test_any_changed_byte_and_any_truncation_of_a_seal_is_found(tmp_path: Path) -> None:
    path = tmp_path / "seal.json"
    write_sealed(path, {"rows": [0, 8], "files": {"tokens/c/0": {"size_bytes": 12}}})
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        for damaged in (bytes(changed), whole[:position]):
            path.write_bytes(damaged)
            with pytest.raises(CorruptCacheError, match=r"seal\.json is damaged"):
                read_sealed(path)


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{}", '{"xxh3_128": 4}', "\xff{"])
def test_other_json_is_no_seal(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(CorruptCacheError, match="is damaged"):
        read_sealed(tmp_path / "a.json")


def test_a_missing_seal_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"none\.json does not exist"):
        read_sealed(tmp_path / "none.json")


@given(st.lists(st.binary(max_size=30)))
def test_checksum_is_of_the_bytes_however_they_are_cut(tmp_path_factory, parts) -> None:
    path = tmp_path_factory.mktemp("sum") / "a"
    write_atomic(path, parts)
    assert path.read_bytes() == b"".join(parts)
    expected = {"xxh3_128": checksum([b"".join(parts)]), "size_bytes": len(b"".join(parts))}
    assert file_entry(path) == expected | {"xxh3_128": checksum(parts)}


def test_a_full_disk_is_a_sentence_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CacheError, match=r"a cannot be written: File too large.*run the same"):
            write_atomic(path, [bytes(900), bytes(900)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "under" / "a", [b"x"])
