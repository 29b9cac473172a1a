"""How fast rows are read, decoded and written, against the limits of numpy and of the disk."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cache_data import (
    BenchData,
    bench_teacher,
    drop_from_page_cache,
    empty_cache,
    fastest,
    shard_rows,
    write_rows,
)
from movekd.cache.codecs import codec
from movekd.cache.layout import group_name, shard_file
from movekd.cache.reader import TeacherCache
from movekd.cache.writer import TeacherWriter
from report import Figure, interleaved_ratio

Rows = npt.NDArray[np.int64]
LOADER_BATCHES = 48


def memmap_gathers(data: BenchData) -> dict[str, Callable[[Rows], None]]:
    """Return the ways in which numpy gathers rows of memmaps into buffers that are reused."""
    maps, (_, out) = data.memmaps(), data.buffers()

    def take(rows: Rows) -> None:
        for name, values in maps.items():
            np.take(values, rows, axis=0, out=out[name], mode="clip")  # "raise" copies twice

    def row_by_row(rows: Rows) -> None:
        for name, values in maps.items():
            for position, row in enumerate(rows.tolist()):
                out[name][position] = values[row]

    return {"take": take, "row by row": row_by_row}


def gib_s(data: BenchData, read: Callable[[], object]) -> float:
    """Return the median rate in GB/s over 40 batches."""
    seconds = []
    for _ in range(40):
        started = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - started)
    return data.batch_bytes / statistics.median(seconds) / 1e9


def warm_figures(data: BenchData, pairs: int) -> list[Figure]:
    """Everything in the page cache: movekd against a numpy gather of the same bytes."""
    store, (out, _), batches = data.open_warm(), data.buffers(), data.random_batches()
    ways = memmap_gathers(data)
    best = fastest(ways, batches)

    def ours() -> None:
        store.read(next(batches), out=out)

    def memmap() -> None:
        ways[best](next(batches))

    for _ in range(200):  # every page mapped, on both sides
        ours()
        memmap()
    ratio, low, high = interleaved_ratio(memmap, ours, pairs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a DataLoader's worker; numpy's gather has one at all times
    single = interleaved_ratio(memmap, ours, pairs)
    torch.set_num_threads(threads)
    own_gb_s = gib_s(data, ours)
    return [
        Figure(
            "read_over_memmap",
            ratio,
            f"rate of reading random batches of {data.batch_size} rows, all in the page cache, "
            f"over that of numpy's memmap gather ({best}); median of {pairs} pairs",
            (low, high),
            at_least=0.85,
        ),
        Figure(
            "read_one_thread_over_memmap",
            single[0],
            "the same with copies in one thread, as in a DataLoader's worker",
            single[1:],
        ),
        Figure("read_gb_s", own_gb_s, "movekd's own rate, GB/s of stored bytes"),
        Figure("read_images_s", own_gb_s * 1e9 / data.layout.row_bytes, "the same in images/s"),
        Figure("memmap_gb_s", gib_s(data, memmap), "numpy's, GB/s"),
        Figure(
            "decode_gb_s",
            gib_s(data, lambda: codec("int8").decode(out, store.stats)),
            f"int8 to float32 with torch on the CPU, {torch.get_num_threads()} threads; GB/s of "
            "stored bytes",
        ),
    ]


def cold_figures(data: BenchData, pairs: int) -> list[Figure]:
    """Nothing in the page cache: movekd against 16 threads of pread into reused buffers.

    A page that is mapped cannot be dropped, so each batch is read by a store that was opened anew.
    """
    (out, arrays), batches = data.buffers(), data.random_batches(seed=1)
    layout, group = data.layout, data.cache / group_name("clip")
    size = layout.rows_per_shard
    files = {
        (name, shard): group / shard_file(array, shard)
        for name, array in layout.arrays.items()
        for shard in range(layout.num_shards(data.num_rows))
    }
    opened = {key: os.open(path, os.O_RDONLY) for key, path in files.items()}
    for descriptor in opened.values():  # no reading ahead of what was asked for
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    views = {name: values.data.cast("B") for name, values in arrays.items()}
    firsts = np.arange(0, data.num_rows, size)
    stores: list[TeacherCache] = []

    def prepare(is_open: bool) -> None:
        stores[:] = [data.open()]
        drop_from_page_cache(files.values())
        if is_open:  # by reading the first row of each Zarr shard, which stays in memory
            stores[0].read(firsts)
        for _ in range(5):  # what is on its way from the disk at this instant cannot be dropped
            drop_from_page_cache(files.values())
            if not any(is_cached(row) for row in set(rows()[:4].tolist())):
                return
        raise SystemExit(
            f"{data.folder} stays in memory when it is dropped from the page cache; name a folder "
            "on a disk with --dir."
        )

    def is_cached(row: int) -> bool:
        start = row % size * layout.arrays["tokens"].row_bytes
        try:
            os.preadv(opened["tokens", row // size], [bytearray(1)], start, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        return True

    def rows() -> Rows:
        drawn = next(batches)
        return np.where(drawn % size == 0, drawn + 1, drawn)

    def ours() -> None:
        stores[0].read(rows(), out=out)

    with ThreadPoolExecutor(16) as pool:

        def pread(job: tuple[str, int, int]) -> None:
            name, position, row = job
            row_bytes = layout.arrays[name].row_bytes
            target = views[name][position * row_bytes : (position + 1) * row_bytes]
            os.preadv(opened[name, row // size], [target], row % size * row_bytes)

        def preads() -> None:
            drawn = rows().tolist()
            jobs = [(name, *job) for name in layout.arrays for job in enumerate(drawn)]
            list(pool.map(pread, jobs))

        ratio, low, high = interleaved_ratio(preads, ours, pairs, lambda: prepare(True))
        first = interleaved_ratio(preads, ours, pairs, lambda: prepare(False))
    for descriptor in opened.values():
        os.close(descriptor)
    what = f"of random batches of {data.batch_size} rows over that of 16 threads of pread"
    return [
        Figure(
            "cold_read_over_pread",
            ratio,
            f"rate {what}, the page cache dropped before each; median of {pairs} pairs",
            (low, high),
            at_least=0.9,
        ),
        Figure(
            "cold_first_read_over_pread",
            first[0],
            "the same when movekd must open and map every file as well (pread's are open)",
            first[1:],
        ),
    ]


class Stored(Dataset[dict[str, Tensor]]):
    """Rows -> their arrays, read by movekd."""

    def __init__(self, data: BenchData) -> None:
        self.store = data.open()

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return dict(self.store.read(rows).stored)


class Mapped(Dataset[dict[str, Tensor]]):
    """Rows -> their arrays, gathered by numpy."""

    def __init__(self, data: BenchData) -> None:
        self.maps, self.store = data.memmaps(), data.open()

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        out = self.store.empty(len(rows))
        for name, values in self.maps.items():
            np.take(values, rows, axis=0, out=out[name].numpy(), mode="clip")
        return out


class Batches:
    """A batch sampler of random rows, others in each epoch."""

    def __init__(self, data: BenchData) -> None:
        self._batches = data.random_batches(seed=2)

    def __len__(self) -> int:
        return LOADER_BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(LOADER_BATCHES):
            yield next(self._batches).tolist()


def as_it_is(batch: Any) -> Any:
    """Collate nothing."""
    return batch


def loader_figures(data: BenchData, pairs: int) -> list[Figure]:
    """Through a DataLoader of two workers, into torch tensors."""
    data.open_warm()

    def epoch(dataset: Dataset[dict[str, Tensor]]) -> Callable[[], None]:
        loader = DataLoader(
            dataset,
            batch_sampler=Batches(data),
            num_workers=2,
            collate_fn=as_it_is,
            persistent_workers=True,
            multiprocessing_context="fork",
        )

        def run() -> None:
            for batch in loader:
                assert len(batch["tokens"]) == data.batch_size

        run()
        return run

    ours, memmap = epoch(Stored(data)), epoch(Mapped(data))
    ratio, low, high = interleaved_ratio(memmap, ours, pairs)
    return [
        Figure(
            "loader_over_memmap",
            ratio,
            f"rate of a DataLoader of 2 workers over that of the same over numpy's memmaps; "
            f"{LOADER_BATCHES} batches, median of {pairs} pairs",
            (low, high),
            at_least=0.9,
        )
    ]


def write_shard_figures(folder: Path, pairs: int) -> list[Figure]:
    """Write sealed Zarr shards, against the same bytes in one file with one fsync."""
    spec, calibration, stats = bench_teacher()
    size = calibration.layout(spec).rows_per_shard
    storage = empty_cache(folder, spec, calibration, stats, 2 * size)
    writer = TeacherWriter(storage, spec.name, 2 * size)
    arrays: dict[str, npt.NDArray[Any]] = shard_rows(size, stats, seed=0)
    plain = folder / "plain"

    def ours() -> None:
        write_rows(writer, 0, arrays)

    def one_file() -> None:
        with plain.open("wb", buffering=0) as file:
            for values in arrays.values():
                file.write(values.reshape(-1).view(np.uint8).data)
            os.fsync(file.fileno())

    def clean() -> None:
        plain.unlink(missing_ok=True)
        for name in calibration.layout(spec).arrays.values():
            (folder / "cache" / group_name("clip") / shard_file(name, 0)).unlink(missing_ok=True)
        os.sync()

    clean()
    ratio, low, high = interleaved_ratio(one_file, ours, pairs, clean)
    clean()
    started = time.perf_counter()
    one_file()
    seconds = time.perf_counter() - started
    num_bytes = plain.stat().st_size
    return [
        Figure(
            "write_over_fsync",
            ratio,
            f"rate of writing a sealed Zarr shard ({num_bytes / 1e6:.0f} MB, checksums included) "
            f"over a plain write and fsync of the same bytes; median of {pairs} pairs",
            (low, high),
            at_least=0.8,
        ),
        Figure("fsync_gb_s", num_bytes / seconds / 1e9, "that write and fsync, GB/s"),
    ]
