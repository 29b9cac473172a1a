"""Measure how fast the storage of a cache writes Zarr shards and reads random rows.

Input: a storage, and the bytes per row. Output: two rates for ``analysis.plan``. All files that
this writes are deleted again, also after an interruption.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from movekd.cache.layout import SHARD_BYTES
from movekd.cache.storage import Storage
from movekd.errors import CacheError

_MAX_BYTES = 2 * SHARD_BYTES
_SECONDS = 1.0
_BLOCK_BYTES = 2**20
_FIRST_BLOCKS = 8
_BATCH = 32
"""Rows per read, as in a training batch."""
_MAX_ROWS = 2**14
_NUM_OBJECTS = 16
_MAX_ROUNDS = 8


@dataclass(frozen=True)
class DiskRates:
    """Rates of a cache's storage; None if not measured."""

    write_bytes_per_s: float | None
    """Files of the size of a Zarr shard, fsync included."""
    read_bytes_per_s: float | None
    """Rows in random order, one batch at a time, none of them in the page cache."""
    reason: str = ""
    """Why a rate is missing."""


def measure_disk(storage: Storage, row_bytes: int) -> DiskRates:
    """Return the rates at which a storage writes Zarr shards and reads random rows.

    Each measurement takes one second; together they need at most 256 MiB of space. On a local disk
    the page cache is dropped before the reads. The caches of a drive, a network file server or the
    host of a virtual machine cannot be dropped. In an object store, objects of one row are read in
    batches: a range request costs the same.

    Args:
        storage: where the cache would lie; it need not exist.
        row_bytes: size of a read, the mean over the teachers; smaller reads give lower rates.
    """
    free = storage.free_bytes()
    if free is not None and free < 2 * _MAX_BYTES:
        reason = f"{free / 1e6:.0f} MB are free, measuring needs {2 * _MAX_BYTES / 1e6:.0f} MB"
        return DiskRates(None, None, reason)
    folder = f"plan-{uuid.uuid4().hex[:12]}"
    try:
        with _nothing_left(storage, folder):
            block = np.random.default_rng(0).bytes(_BLOCK_BYTES)  # random: incompressible
            names, write_rate = _write(storage, folder, block)
            if storage.local_dir is not None:
                paths = [storage.local_dir / name for name in names]
                read_rate = _read_local(paths, row_bytes)
            else:
                read_rate = _read_objects(storage, folder, block, row_bytes)
    except (CacheError, OSError) as error:
        return DiskRates(None, None, str(error))
    return DiskRates(write_rate, read_rate)


@contextlib.contextmanager
def _nothing_left(storage: Storage, folder: str) -> Iterator[None]:
    """Delete ``folder`` at the end, and the folders above it that did not exist before."""
    made: list[Path] = []
    if storage.local_dir is not None:
        path = storage.local_dir.resolve()
        made = [part for part in (path, *path.parents) if not part.exists()]
    try:
        yield
    finally:
        storage.delete_leftovers(folder)
        storage.delete_folder(folder)
        for part in made:
            with contextlib.suppress(OSError):  # another build has filled it
                part.rmdir()


def _write(storage: Storage, folder: str, block: bytes) -> tuple[list[str], float]:
    """Write files for about a second; return their names and bytes/s.

    The first file is small and decides the size of the next, so that a slow disk is not busy for
    long. It also creates folders and opens connections, so it counts only if it is the only one.
    """
    names: list[str] = []
    left, blocks, spent = _MAX_BYTES // _BLOCK_BYTES, _FIRST_BLOCKS, 0.0
    later_blocks, later_seconds, rate = 0, 0.0, 0.0
    while blocks > 0:
        names.append(f"{folder}/{len(names)}")
        started = time.perf_counter()
        storage.write(names[-1], [block] * blocks)
        seconds = max(time.perf_counter() - started, 1e-9)
        rate, spent, left = blocks / seconds, spent + seconds, left - blocks
        if len(names) > 1:
            later_blocks, later_seconds = later_blocks + blocks, later_seconds + seconds
            rate = later_blocks / later_seconds
        affordable = int(rate * (_SECONDS - spent))
        blocks = min(affordable, left, SHARD_BYTES // _BLOCK_BYTES)
    return names, rate * _BLOCK_BYTES


def _read_local(paths: list[Path], row_bytes: int) -> float | None:
    """Return bytes/s of reading rows in random order, for about a second.

    The kernel gets the byte ranges of a whole batch before the first row is copied, as in training.
    """
    # Without a way to drop the page cache, the rate would be that of the page cache.
    if not hasattr(os, "posix_fadvise"):
        return None
    files = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        sizes = [os.fstat(file).st_size for file in files]
        row_bytes = min(row_bytes, *sizes)
        for file in files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        counts = np.array(sizes) // row_bytes
        rows = np.random.default_rng(0).permutation(counts.sum())[:_MAX_ROWS]
        file_of = np.searchsorted(counts.cumsum(), rows, side="right")
        offsets = (rows - (counts.cumsum() - counts)[file_of]) * row_bytes
        ranges = [(files[at], offset) for at, offset in zip(file_of, offsets.tolist(), strict=True)]
        done, started = 0, time.perf_counter()
        for first in range(0, len(ranges), _BATCH):
            batch = ranges[first : first + _BATCH]
            for file, offset in batch:
                os.posix_fadvise(file, offset, row_bytes, os.POSIX_FADV_WILLNEED)
            done += sum(len(os.pread(file, row_bytes, offset)) for file, offset in batch)
            if time.perf_counter() - started > _SECONDS:
                break
        return done / max(time.perf_counter() - started, 1e-9)
    finally:
        for file in files:
            os.close(file)


def _read_objects(storage: Storage, folder: str, block: bytes, row_bytes: int) -> float:
    """Return bytes/s of reading objects of one row each, all at once."""
    content = (block * -(-row_bytes // len(block)))[:row_bytes]
    names = [f"{folder}/row{number}" for number in range(_NUM_OBJECTS)]
    for name in names:
        storage.write(name, [content])
    done, started = 0, time.perf_counter()
    for _ in range(_MAX_ROUNDS):
        done += sum(len(found) for found in storage.read_many(names).values())
        if time.perf_counter() - started > _SECONDS:
            break
    return done / max(time.perf_counter() - started, 1e-9)
