"""Tests of movekd.cache.contents: what the seals say, without a feature and without torch."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from builds import build
from movekd.cache.contents import open_contents
from movekd.cache.reader import open_cache
from movekd.cache.seal import read_sealed
from movekd.cache.storage import open_storage
from movekd.cache.verify import status
from movekd.errors import CacheError, CorruptCacheError


def test_what_is_sealed_is_what_the_reader_says(cache_dir) -> None:
    sealed, cache = open_contents(cache_dir), open_cache(cache_dir)
    assert sealed.teachers == cache.teachers
    assert status(sealed) == status(cache)
    for name in sealed.teachers:
        teacher, store = sealed.sealed(name), cache[name]
        assert (teacher.spec, teacher.calibration) == (store.spec, store.calibration)
        expected = store.stats.group_arrays()
        assert list(teacher.group_arrays) == list(expected)
        assert all(np.array_equal(teacher.group_arrays[name], expected[name]) for name in expected)
    with pytest.raises(CacheError, match=r"no teacher 'clap'.*Did you mean 'clip'"):
        sealed.sealed("clap")


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_sums_are_the_seals_side_by_side(
    tmp_path, corpus_dir, tiny_specs, small_shards, monkeypatch, at_once
) -> None:
    monkeypatch.setattr("movekd.cache.contents._SEALS_AT_ONCE", at_once)
    build(tmp_path / "cache", corpus_dir, tiny_specs[:1])
    (tmp_path / "cache" / "clip.seals" / "00001.json").unlink()
    teacher = open_contents(tmp_path / "cache").sealed("clip")
    seals, sums = teacher.seals, teacher.sums
    assert teacher.missing_shards == [1]
    assert sums.shards_S.tolist() == list(seals) == [0, 2]
    assert sums.rows_S2.tolist() == [seal.rows for seal in seals.values()]
    assert [key.decode() for key in sums.keys_S] == [s.keys_xxh3_128 for s in seals.values()]
    assert sums.error_max_S.tolist() == [seal.error.max for seal in seals.values()]
    assert sums.size_bytes_S.tolist() == [
        sum(file.size_bytes for file in seal.files.values()) for seal in seals.values()
    ]


def test_any_changed_byte_of_a_seal_is_found_or_changes_nothing(tmp_path: Path, cache_dir) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    path = tmp_path / "cache" / "clip.seals" / "00000.json"
    cache, whole = open_contents(tmp_path / "cache"), path.read_bytes()
    expected = cache.sealed("clip").seals
    teacher, found = cache.sealed("clip"), 0
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            assert dict(teacher._read_seals()) == expected
        except CorruptCacheError:
            found += 1
        with pytest.raises(CorruptCacheError, match=r"00000\.json is damaged"):
            read_sealed(open_storage(tmp_path / "cache"), "clip.seals/00000.json")
    assert found > 0.8 * len(whole)  # the rest is white space


def test_a_seal_that_goes_while_it_is_read_is_a_sentence(tmp_path: Path, cache_dir) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    teacher = open_contents(tmp_path / "cache").sealed("clip")
    (tmp_path / "cache" / "clip.seals" / "00000.json").unlink()
    with pytest.raises(CorruptCacheError, match=r"00000\.json is damaged"):
        _ = teacher.sums
