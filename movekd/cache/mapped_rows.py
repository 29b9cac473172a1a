"""Read rows of uncompressed Zarr shards on a local disk through memory maps.

A row is one copy per array, from the mapped file into the batch. Compressed rows and object stores
are read by ``tensorstore_rows``.
"""

import contextlib
import errno
import itertools
import mmap
import os
import resource
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from movekd.cache.codecs import ArrayLayout
from movekd.cache.layout import TeacherLayout, index_bytes, shard_file
from movekd.cache.shard_file import ABSENT, parse_index
from movekd.errors import CacheError, CorruptCacheError

MAX_SHARDS = 1024
"""Most Zarr shards that a teacher keeps mapped. Five teachers of four arrays then need 20,480 maps;
Linux allows a process 65,530. A cache can have hundreds of thousands of files."""
WANTED_FILES = 65_536
CACHED_BATCHES = 16
"""After so many batches in memory, the page cache is asked about one row instead of all."""
MAX_THREADS, THREADED_BYTES = 4, 4 * 2**20
"""Limits of one read: a small batch is copied before a second thread has woken up."""

_RWF_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # only Linux has it


class MappedRows:
    """The uncompressed Zarr shards of one teacher's group on a local disk.

    Thread-safe, and usable in a forked child whether or not the parent has read before.

    Args:
        group: folder of the teacher's Zarr group.
        layout: its arrays.
    """

    def __init__(self, group: Path, layout: TeacherLayout) -> None:
        self._group, self._layout = group, layout
        self._max_shards = min(MAX_SHARDS, _shards_within_file_limit(len(layout.arrays)))
        self._recent: dict[int, MappedShard] = {}  # the one read last at the end
        self._cached_batches = 0
        self._lock, self._lock_pid = threading.Lock(), os.getpid()
        self._pool: ThreadPoolExecutor | None = None

    def read(self, rows: npt.NDArray[np.int64], into: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy every array of ``rows`` into ``into[name]``, in the order asked; repeats are fine.

        Args:
            rows: row numbers, in range and of sealed Zarr shards.
            into: for each array, (len(rows), *row_shape) of its dtype.

        Raises:
            CacheError: a row was never written.
            CorruptCacheError: a file is missing, damaged, or shorter than its index says.
        """
        places = [divmod(row, self._layout.rows_per_shard) for row in rows.tolist()]
        for start in range(0, len(places), self._max_shards):
            some = slice(start, start + self._max_shards)  # so many rows need no more Zarr shards
            self._read(places[some], [into[name][some] for name in self._layout.arrays])

    def _read(self, places: Sequence[tuple[int, int]], into: Sequence[npt.NDArray[Any]]) -> None:
        found, new = self._mapped({shard for shard, _ in places})
        picked = [(found[shard], offset) for shard, offset in places]
        try:
            if new or not self._is_cached(picked):
                for index in range(len(into)):
                    for shard, offset in picked:
                        shard.files[index].announce(offset)
            if new:
                self._open(new)
            views = [  # all of them before the first copy fills the processor's caches
                [shard.rows[index][shard.orders[index][offset]] for shard, offset in picked]
                for index in range(len(into))
            ]
        except LookupError:
            for shard, offset in picked:
                shard.require(offset)
            raise
        self._copy(views, into)

    def _copy(
        self, views: Sequence[list[npt.NDArray[Any]]], into: Sequence[npt.NDArray[Any]]
    ) -> None:
        """Copy the rows of each array, in as many threads as torch would compute with.

        One core does not reach the rate of the memory. A DataLoader's worker has one thread.
        """
        num_threads = min(torch.get_num_threads(), MAX_THREADS, len(views[0]))
        if num_threads < 2 or sum(target.nbytes for target in into) < THREADED_BYTES:
            for rows, target in zip(views, into, strict=True):
                np.concatenate(rows, out=target)
            return
        bounds = [len(views[0]) * i // num_threads for i in range(num_threads + 1)]
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]

        def copy(part: slice) -> None:
            for rows, target in zip(views, into, strict=True):
                np.concatenate(rows[part], out=target[part])

        if self._pool is None:
            self._pool = ThreadPoolExecutor(MAX_THREADS - 1, "movekd-read")
        others = [self._pool.submit(copy, part) for part in parts[1:]]
        copy(parts[0])
        for other in others:
            other.result()

    def _is_cached(self, picked: Sequence[tuple["MappedShard", int]]) -> bool:
        """Return whether the rows seem to be in the page cache.

        If rows are on the disk, all of them must be announced before the first copy waits: that
        gives ten times the rate. If rows are in memory, announcing them costs a third of the batch,
        because the kernel walks all their pages. So the last byte of each row's largest array is
        read without waiting; the kernel drops pages that were read together at about the same
        time. This costs a tenth of a batch. After many batches in memory only one row is asked,
        until it is not in memory.
        """
        probed = picked if self._cached_batches < CACHED_BATCHES else picked[:1]
        is_cached = all(shard.largest.is_cached(offset) for shard, offset in probed)
        self._cached_batches = self._cached_batches + 1 if is_cached else 0
        return is_cached

    def _mapped(
        self, numbers: Iterable[int]
    ) -> tuple[dict[int, "MappedShard"], dict[int, "MappedShard"]]:
        """Return the Zarr shards, and the new ones among them, whose indexes are not read yet.

        The caller's reference keeps a Zarr shard mapped that another thread evicts.
        """
        if self._lock_pid != os.getpid():  # forked, perhaps while a thread of the parent had it
            self._lock, self._lock_pid, self._pool = threading.Lock(), os.getpid(), None
        with self._lock:
            found = {n: self._recent.pop(n) for n in numbers if n in self._recent}
            self._recent |= found
        new = {n: MappedShard(self._group, self._layout, n) for n in numbers if n not in found}
        return found | new, new

    def _open(self, new: Mapping[int, "MappedShard"]) -> None:
        for shard in new.values():
            shard.open()
        with self._lock:
            self._recent |= new
            for oldest in list(self._recent)[: max(len(self._recent) - self._max_shards, 0)]:
                del self._recent[oldest]


class MappedShard:
    """One Zarr shard: one mapped file per array, in the layout's order."""

    def __init__(self, group: Path, layout: TeacherLayout, number: int) -> None:
        arrays = list(layout.arrays.values())
        largest = max(range(len(arrays)), key=lambda index: arrays[index].row_bytes)
        self.files = [
            MappedFile(
                group / shard_file(array, number), array, layout.rows_per_shard, index == largest
            )
            for index, array in enumerate(arrays)
        ]
        self.largest = self.files[largest]

    def open(self) -> None:
        """Read the indexes."""
        for file in self.files:
            file.read_index()
        # tuples, for the loop over the rows of a batch
        self.rows = tuple(file.rows for file in self.files)
        self.orders = tuple(file.order for file in self.files)

    def require(self, offset: int) -> None:
        """Raise CacheError unless this row was written."""
        for file in self.files:
            if offset not in file.order:
                raise CacheError(
                    f"row {offset} of {file.path} was never written: it lies in the gap before "
                    "appended images. Take rows from `cache.rows(names)`."
                )


class MappedFile:
    """One uncompressed shard file, mapped. Its chunks lie at equal distances, in any order.

    Call ``read_index`` next. It waits for the disk; so first map all files and announce their rows
    at the places where movekd writes them.

    Args:
        path: the file.
        array: what it holds.
        rows_per_shard: entries of its index.
        is_probed: whether ``is_cached`` will be called; it takes a file descriptor.
    """

    def __init__(
        self, path: Path, array: ArrayLayout, rows_per_shard: int, is_probed: bool
    ) -> None:
        self.path, self._array, self._rows_per_shard = path, array, rows_per_shard
        self.order: range | dict[int, int] = range(rows_per_shard)
        """Row -> place of its chunk. Mostly in order: a range takes no memory."""
        self._index_bytes = index_bytes(rows_per_shard)
        self._descriptor = -1
        try:
            # O_NONBLOCK: opening a FIFO without it waits for a writer
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise CorruptCacheError(
                        f"{path} is sealed but is no regular file. Run `movekd cache verify`."
                    )
                size = found.st_size
                if size < self._index_bytes:
                    raise CorruptCacheError(
                        f"{path} has {size} bytes, less than its index of {self._index_bytes}: it "
                        "is truncated. Run `movekd cache verify`."
                    )
                self._bytes = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
                if is_probed:
                    self._descriptor = os.dup(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise CacheError(
                    f"{path} cannot be opened: {error.strerror}. This process has no files or maps "
                    "left; raise `ulimit -n` (and `sysctl vm.max_map_count`), or use fewer threads."
                ) from None
            raise CorruptCacheError(
                f"{path} is sealed but cannot be opened ({error.strerror}). "
                "Run `movekd cache verify`."
            ) from None
        self._will_need(size - self._index_bytes, self._index_bytes)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_index(self) -> None:
        """Read where each row lies.

        Raises:
            CorruptCacheError: the index is damaged, or the file shorter than it says.
        """
        path, row_bytes = self.path, self._array.row_bytes
        index = parse_index(self._bytes[-self._index_bytes :])
        if index is None:
            raise CorruptCacheError(
                f"{path}: the checksum of the shard index is wrong; the file is truncated or "
                "damaged. Run `movekd cache verify`."
            )
        present = np.flatnonzero(index[:, 0] != ABSENT)
        offsets, sizes = index[present].T  # uint64, and a stranger's: no sum may overflow
        data_bytes = len(self._bytes) - self._index_bytes
        if (sizes != row_bytes).any() or (offsets % np.uint64(row_bytes)).any():
            raise CorruptCacheError(
                f"{path} holds chunks of other sizes than the {row_bytes} bytes of a row; "
                "movekd did not write it. Run `movekd cache verify`."
            )
        if len(offsets) and int(offsets.max()) + row_bytes > data_bytes:  # Python's integers
            raise CorruptCacheError(f"{path} is truncated. Run `movekd cache verify`.")
        offsets = offsets.astype(np.int64)
        if not np.array_equal(offsets, np.arange(self._rows_per_shard) * row_bytes):
            places = (offsets // row_bytes).tolist()
            self.order = dict(zip(present.tolist(), places, strict=True))
        shape = (data_bytes // row_bytes, 1, *self._array.row_shape)
        self.rows: npt.NDArray[Any] = np.ndarray(shape, self._array.dtype, self._bytes)

    def is_cached(self, offset: int) -> bool:
        """Return whether the row's last byte is in memory; False if that is unknown.

        Raises:
            CorruptCacheError: the file was cut short since it was opened. Reading through the map
                would kill the process (SIGBUS).
        """
        if _RWF_NOWAIT is None:
            return False
        last = (self.order[offset] + 1) * self._array.row_bytes - 1
        try:
            count = os.preadv(self._descriptor, (bytearray(1),), last, _RWF_NOWAIT)
        except OSError:  # it would wait, or the file system cannot tell
            return False
        if not count:
            raise CorruptCacheError(f"{self.path} is truncated. Run `movekd cache verify`.")
        return True

    def announce(self, offset: int) -> None:
        """Tell the kernel that this row will be read next."""
        self._will_need(self.order[offset] * self._array.row_bytes, self._array.row_bytes)

    def _will_need(self, start: int, length: int) -> None:
        aligned = start - start % mmap.PAGESIZE
        with contextlib.suppress(OSError, ValueError):  # only advice: the read itself raises
            self._bytes.madvise(mmap.MADV_WILLNEED, aligned, start - aligned + length)


def _shards_within_file_limit(num_arrays: int) -> int:
    """Return how many Zarr shards a teacher may keep open: an eighth of the process's files.

    Python's ``mmap`` keeps a file descriptor, and one file per Zarr shard is probed. With the usual
    soft limit of 1,024 files, 25 Zarr shards would fit and every batch would map new ones. So the
    limit is raised to what the system allows this process.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if resource.RLIM_INFINITY != limit < allowed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            limit = allowed
    if limit == resource.RLIM_INFINITY:
        return MAX_SHARDS
    return max(limit // (8 * (num_arrays + 1)), 1)
