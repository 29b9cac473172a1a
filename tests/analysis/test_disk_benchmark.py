import os
from collections import namedtuple

import pytest

from movekd.analysis import disk_benchmark
from movekd.analysis.disk_benchmark import measure_disk
from movekd.cache.storage import LocalStorage, open_storage

ROW_BYTES = 5000


@pytest.fixture(autouse=True)
def _little(monkeypatch) -> None:
    """10 MiB at most instead of 256."""
    monkeypatch.setattr(disk_benchmark, "_MAX_BYTES", 10 * 2**20)


def test_rates_are_measured_and_nothing_is_left(tmp_path, snapshot) -> None:
    (tmp_path / "there.txt").write_text("kept")
    before = snapshot(tmp_path)
    rates = measure_disk(LocalStorage(tmp_path), ROW_BYTES)
    assert rates.write_bytes_per_s > 0
    assert rates.read_bytes_per_s > 0
    assert rates.reason == ""
    measure_disk(LocalStorage(tmp_path / "not" / "there"), ROW_BYTES)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["there.txt"]


def test_each_row_is_read_once(tmp_path, monkeypatch) -> None:
    """A row that is read again comes from memory."""
    seen = []
    read = os.pread

    def count(file, size, offset):
        seen.append((os.fstat(file).st_ino, offset))
        assert size == ROW_BYTES
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", count)
    monkeypatch.setattr(disk_benchmark, "_SECONDS", 60.0)
    measure_disk(LocalStorage(tmp_path), ROW_BYTES)
    assert len(set(seen)) == len(seen)
    sizes = (8 * 2**20, 2 * 2**20)
    assert len(seen) == sum(size // ROW_BYTES for size in sizes)
    assert seen != sorted(seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", ["write", "fsync", "pread"])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, step, error) -> None:
    calls = 0
    real = getattr(os, step)

    def interrupt(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return real(*arguments)

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(error):
        measure_disk(LocalStorage(tmp_path / "cache"), ROW_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_and_nothing_written(tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "free")(10**7)
    monkeypatch.setattr("movekd.cache.storage.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr(LocalStorage, "write", None)
    rates = measure_disk(LocalStorage(tmp_path), ROW_BYTES)
    assert (rates.write_bytes_per_s, rates.read_bytes_per_s) == (None, None)
    assert rates.reason == "10 MB are free, measuring needs 21 MB"


def test_a_place_that_takes_no_file_is_said(tmp_path) -> None:
    (tmp_path / "file").write_text("no folder")
    rates = measure_disk(LocalStorage(tmp_path / "file" / "cache"), ROW_BYTES)
    assert rates.write_bytes_per_s is None
    assert "cannot be written" in rates.reason


def test_an_object_store_is_measured_and_left_empty() -> None:
    storage = open_storage("memory://disk/cache")
    rates = measure_disk(storage, 3 * 2**20 + 1)
    assert rates.write_bytes_per_s > 0
    assert rates.read_bytes_per_s > 0
    assert storage.sizes() == {}
