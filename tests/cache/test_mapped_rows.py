"""Against plain numpy arrays, whatever the order of the chunks and of the rows."""

import gc
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from movekd.cache import layout, mapped_rows
from movekd.cache.layout import TeacherLayout, shard_file, teacher_layout
from movekd.cache.mapped_rows import MappedRows
from movekd.errors import CacheError, CorruptCacheError

ROWS = 8
NUM_SHARDS = 5
NUM_ROWS = ROWS * NUM_SHARDS - 3
GAP = (13, 15)  # rows never written; and the last three of the last Zarr shard


def write(group: Path, teacher: TeacherLayout, arrays, is_shuffled: bool) -> None:
    """Write Zarr shards, with chunks in another order in each file, or in theirs."""
    random = np.random.default_rng(0)
    for name, array in teacher.arrays.items():
        for shard in range(NUM_SHARDS):
            rows = [row for row in range(shard * ROWS, NUM_ROWS)[:ROWS] if row not in GAP]
            if is_shuffled:
                random.shuffle(rows)
            index = np.full((ROWS, 2), 2**64 - 1, "<u8")
            for place, row in enumerate(rows):
                index[row % ROWS] = place * array.row_bytes, array.row_bytes
            raw_index = index.tobytes()
            raw_index += google_crc32c.value(raw_index).to_bytes(4, "little")
            path = group / shard_file(array, shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(arrays[name][rows].tobytes() + raw_index)


@pytest.fixture(scope="module")
def teacher() -> TeacherLayout:
    """Rows of tokens longer than a page, and no row a whole number of pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_SHARD_ROWS", ROWS)
        return teacher_layout("int8", 49, 200, cls_width=200, num_heads=3)


@pytest.fixture(scope="module")
def arrays(teacher) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        name: random.integers(-100, 100, (NUM_ROWS, *array.row_shape)).astype(array.dtype)
        for name, array in teacher.arrays.items()
    }


@pytest.fixture(scope="module")
def groups(teacher, arrays, tmp_path_factory) -> dict[bool, Path]:
    """Whether the chunks are shuffled -> folder."""
    folders = {shuffled: tmp_path_factory.mktemp("group") for shuffled in (False, True)}
    for is_shuffled, group in folders.items():
        write(group, teacher, arrays, is_shuffled)
    return folders


def read(store: MappedRows, teacher: TeacherLayout, rows) -> dict[str, np.ndarray]:
    rows = np.asarray(rows, np.int64)
    into = {
        name: np.full((len(rows), *array.row_shape), 111, array.dtype)
        for name, array in teacher.arrays.items()
    }
    store.read(rows, into)
    return into


def assert_equal(found, arrays, rows) -> None:
    for name, values in found.items():
        np.testing.assert_array_equal(values, arrays[name][rows])


written = st.sampled_from([row for row in range(NUM_ROWS) if row not in GAP])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(written, max_size=30), max_size=4), st.booleans(), st.integers(1, 6))
def test_any_rows_in_any_order_are_what_was_written(
    teacher, arrays, groups, batches, is_shuffled, max_shards
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_rows, "MAX_SHARDS", max_shards)
        store = MappedRows(groups[is_shuffled], teacher)
    for rows in batches:
        assert_equal(read(store, teacher, rows), arrays, np.array(rows, np.int64))


def test_buffers_need_not_be_contiguous(teacher, arrays, groups) -> None:
    rows = np.array([7, 30, 7, 2])
    into = {
        name: np.zeros((8, *array.row_shape), array.dtype)[::2]
        for name, array in teacher.arrays.items()
    }
    MappedRows(groups[True], teacher).read(rows, into)
    assert_equal(into, arrays, rows)


@pytest.mark.parametrize("max_shards", [1, 2])
def test_threads_that_evict_each_other_read_what_was_written(
    teacher, arrays, groups, max_shards, monkeypatch
) -> None:
    monkeypatch.setattr(mapped_rows, "MAX_SHARDS", max_shards)
    store = MappedRows(groups[True], teacher)
    valid = np.array([row for row in range(NUM_ROWS) if row not in GAP])
    orders = [np.random.default_rng(seed).permutation(valid) for seed in range(64)]
    with ThreadPoolExecutor(4) as pool:
        for rows, found in zip(
            orders, pool.map(lambda rows: read(store, teacher, rows), orders), strict=True
        ):
            assert_equal(found, arrays, rows)


def open_maps(group: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{group}/")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("max_shards", [1, 3])
def test_maps_and_files_stay_bounded(teacher, groups, max_shards, monkeypatch) -> None:
    monkeypatch.setattr(mapped_rows, "MAX_SHARDS", max_shards)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    store = MappedRows(groups[False], teacher)
    for row in [*range(0, 12), *range(16, NUM_ROWS)]:
        read(store, teacher, [row])
        assert open_maps(groups[False]) <= max_shards * len(teacher.arrays)
        used = len(os.listdir("/proc/self/fd")) - before
        assert used <= max_shards * (len(teacher.arrays) + 1)
    read(store, teacher, [*range(0, 12), *range(16, NUM_ROWS)])
    assert open_maps(groups[False]) == max_shards * len(teacher.arrays)
    del store
    assert open_maps(groups[False]) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_low_limit_of_open_files_is_raised_or_kept(teacher, arrays, groups, monkeypatch) -> None:
    rows, raised = np.array([0, 9, 17, 26, 33, 1]), []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    infinity = resource.RLIM_INFINITY
    for limits in ((1, 1), (64, 64), (infinity, infinity), (64, 4096), (64, infinity)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        assert_equal(read(MappedRows(groups[False], teacher), teacher, rows), arrays, rows)
    assert raised == [(4096, 4096), (65_536, infinity)]


def test_several_threads_copy_what_one_does(teacher, arrays, groups, monkeypatch) -> None:
    monkeypatch.setattr(mapped_rows, "THREADED_BYTES", 0)
    generator, store = np.random.default_rng(3), MappedRows(groups[False], teacher)
    for num_threads in (1, 2, 3, 4, 9):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        for size in (0, 1, 2, 7):
            rows = generator.choice([row for row in range(NUM_ROWS) if row not in GAP], size)
            assert_equal(read(store, teacher, rows), arrays, rows)


def drop_from_page_cache(group: Path) -> None:
    for path in group.rglob("0"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def test_cold_and_warm_reads_give_the_same(teacher, arrays, groups, monkeypatch) -> None:
    """Cold, warm, warm for long, and where the kernel cannot say."""
    rows = np.array([3, 30, 3, 21, 12, 7, 33])
    for group in groups.values():
        drop_from_page_cache(group)
        store = MappedRows(group, teacher)
        for _ in range(mapped_rows.CACHED_BATCHES + 3):
            assert_equal(read(store, teacher, rows), arrays, rows)
        drop_from_page_cache(group)
        assert_equal(read(store, teacher, rows), arrays, rows)
        with monkeypatch.context() as patch:
            patch.setattr(mapped_rows, "_RWF_NOWAIT", None)
            assert_equal(read(store, teacher, rows), arrays, rows)


@pytest.mark.skipif(mapped_rows._RWF_NOWAIT is None, reason="only Linux can tell")
def test_rows_are_announced_only_when_one_is_not_in_memory(teacher, groups, monkeypatch) -> None:
    announced = []
    announce = mapped_rows.MappedFile.announce
    monkeypatch.setattr(
        mapped_rows.MappedFile,
        "announce",
        lambda file, offset: (announced.append(offset), announce(file, offset)),
    )
    store = MappedRows(groups[False], teacher)
    read(store, teacher, [0, 9])
    assert announced == [0, 1] * len(teacher.arrays)  # of new files, before the indexes
    for _ in range(mapped_rows.CACHED_BATCHES + 3):
        read(store, teacher, [0, 9])
    assert len(announced) == 2 * len(teacher.arrays)

    def preadv(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", preadv)
    for count in (2, 3):
        read(store, teacher, [0, 9])
        assert len(announced) == count * 2 * len(teacher.arrays)


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize("row", [*GAP, NUM_ROWS])
def test_a_row_in_a_gap_is_refused(teacher, groups, row, is_shuffled) -> None:
    store = MappedRows(groups[is_shuffled], teacher)
    for _ in range(2):  # when the Zarr shard is new, and when its index is known
        with pytest.raises(CacheError, match=rf"row {row % ROWS} of .*was never written: it lies"):
            read(store, teacher, [12, row])
    read(store, teacher, [12])


@pytest.mark.parametrize("is_held", [False, True])
def test_a_forked_child_reads_the_same(teacher, arrays, groups, is_held) -> None:
    """Also when a thread of the parent held the lock at that moment."""
    store = MappedRows(groups[True], teacher)
    read(store, teacher, [3, 20])
    rows = np.array([20, 3, 33, 20])
    if is_held:
        store._lock.acquire()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert_equal(read(store, teacher, rows), arrays, rows)
            status = 0
        finally:
            os._exit(status)
    if is_held:
        store._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_equal(read(store, teacher, rows), arrays, rows)


@pytest.fixture
def own_group(teacher, arrays, tmp_path) -> Path:
    write(tmp_path, teacher, arrays, is_shuffled=False)
    return tmp_path


@pytest.mark.parametrize("name", ["tokens", "cls"])
def test_a_file_cut_short_anywhere_is_a_sentence(teacher, own_group, name) -> None:
    path = own_group / shard_file(teacher.arrays[name], 0)
    whole = path.read_bytes()
    sizes = [0, 1, 131, 132, 133, len(whole) // 2, len(whole) - 132, len(whole) - 1]
    for size in sizes:
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptCacheError, match=rf"{name}/c/0/.*trunc.*`movekd cache verify`"):
            read(MappedRows(own_group, teacher), teacher, [1, 9])


@pytest.mark.skipif(mapped_rows._RWF_NOWAIT is None, reason="only Linux can tell")
def test_a_file_cut_short_after_it_was_opened_is_a_sentence(teacher, own_group) -> None:
    store = MappedRows(own_group, teacher)
    read(store, teacher, [0, 9])
    array = teacher.arrays["tokens"]
    os.truncate(own_group / shard_file(array, 1), array.row_bytes)
    with pytest.raises(CorruptCacheError, match=r"is truncated\. Run `movekd cache verify`"):
        read(store, teacher, [0, 9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "checksum of the shard"),
        (lambda data: data[9800:], "is truncated"),
        (lambda data: data[:100], "has 100 bytes, less than its index of 132"),
    ],
)
def test_a_damaged_file_is_a_sentence(teacher, own_group, change, message) -> None:
    path = own_group / shard_file(teacher.arrays["tokens"], 1)
    path.write_bytes(change(path.read_bytes()))
    store = MappedRows(own_group, teacher)
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match=f"{message}.*Run `movekd cache verify`"):
            read(store, teacher, [0, 9])
    read(store, teacher, [0])


def test_a_missing_file_and_foreign_chunks_are_a_sentence(teacher, arrays, own_group) -> None:
    (own_group / shard_file(teacher.arrays["cls"], 0)).unlink()
    with pytest.raises(CorruptCacheError, match=r"is sealed but cannot be opened \(No such file"):
        read(MappedRows(own_group, teacher), teacher, [1])
    other = teacher_layout("int8", 49, 256, cls_width=200, num_heads=3)
    other = replace(other, rows_per_shard=ROWS)
    with pytest.raises(CorruptCacheError, match="chunks of other sizes than the 12544 bytes"):
        read(MappedRows(own_group, other), other, [9])


def test_no_files_left_is_not_called_damage(teacher, groups) -> None:
    """In a child, whose limit ends with it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            store = MappedRows(groups[False], teacher)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
            try:
                read(store, teacher, [0])
            except CorruptCacheError:
                code = 2
            except CacheError as error:
                code = 0 if "no files or maps left" in str(error) else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
