import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.cache.schema import EncodingError, GroupRecord, ShardSeal
from movekd.cache.seal import (
    checksum,
    entry,
    open_record,
    read_sealed,
    sealed_bytes,
    write_sealed,
)
from movekd.cache.storage import open_storage
from movekd.errors import CacheError, CorruptCacheError
from movekd.files.ownership import FileEntry

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "xxh3_128"), json_values, max_size=4))
def test_what_was_sealed_is_read_and_equal_content_is_equal_bytes(tmp_path_factory, content):
    storage = open_storage(tmp_path_factory.mktemp("seal"))
    write_sealed(storage, "a.json", content)
    first = storage.read("a.json")
    assert read_sealed(storage, "a.json") == content
    write_sealed(storage, "a.json", dict(reversed(list(content.items()))))
    assert storage.read("a.json") == first
    assert list(storage.sizes()) == ["a.json"]


def test_any_changed_byte_and_any_truncation_of_a_seal_is_found(tmp_path: Path) -> None:
    storage, path = open_storage(tmp_path), tmp_path / "seal.json"
    write_sealed(storage, "seal.json", {"rows": [0, 8], "files": {"tokens/c/0": {"size": 12}}})
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        for damaged in (bytes(changed), whole[:position]):
            path.write_bytes(damaged)
            with pytest.raises(CorruptCacheError, match=r"seal\.json is damaged"):
                read_sealed(storage, "seal.json")


def shard_seal(reason: str = "no image") -> ShardSeal:
    return ShardSeal(
        rows=[0, 8],
        keys_xxh3_128="0" * 32,
        files={"tokens/c/0/0/0": FileEntry(size_bytes=12, xxh3_128="1" * 32)},
        skipped={"3": reason},
        error=EncodingError(mean=0.25, max=1e-17, num_tokens=2**40),
        calibration="2" * 32,
    )


@given(st.text(max_size=50))
def test_a_seal_opens_to_itself_however_it_is_spelled(reason: str) -> None:
    """The own spelling is read without encoding it again; any other one is decoded first."""
    seal = shard_seal(reason)
    raw = sealed_bytes(seal)
    content = json.loads(raw)
    for spelling in (raw, json.dumps(content).encode(), json.dumps(content, indent=4).encode()):
        assert open_record(spelling, "seal", ShardSeal) == seal


def test_any_changed_byte_of_a_shards_seal_is_found() -> None:
    whole = sealed_bytes(shard_seal())
    for position in range(len(whole)):
        for damaged in (bytes([*whole[:position], whole[position] ^ 1 << position % 8]), b""):
            with pytest.raises(CorruptCacheError):
                open_record(damaged + whole[position + 1 :], "seal", ShardSeal)


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{}", '{"xxh3_128": 4}', "\xff{"])
def test_other_json_is_no_seal(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(CorruptCacheError, match="is damaged"):
        read_sealed(open_storage(tmp_path), "a.json")


def test_a_missing_seal_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"none\.json does not exist"):
        read_sealed(open_storage(tmp_path), "none.json")


@given(st.lists(st.binary(max_size=30)))
def test_checksum_is_of_the_bytes_however_they_are_cut(tmp_path_factory, parts) -> None:
    storage = open_storage(tmp_path_factory.mktemp("sum"))
    storage.write("a", parts)
    whole = b"".join(parts)
    assert storage.read("a") == whole
    expected = FileEntry(xxh3_128=checksum([whole]), size_bytes=len(whole))
    assert entry(storage.blocks("a")) == entry(parts) == expected


def test_a_seal_holds_the_keys_of_format_1_and_no_others() -> None:
    """Whatever keys the records of other files take on: seals of equal builds are equal bytes."""
    files = {"tokens/c/0/0/0": entry([b"x"])}
    content = json.loads(sealed_bytes(GroupRecord(num_rows=0, files=files)))
    assert content.keys() == {"num_rows", "files", "xxh3_128"}
    assert content["files"]["tokens/c/0/0/0"].keys() == {"size_bytes", "xxh3_128"}
