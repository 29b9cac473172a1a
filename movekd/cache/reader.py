"""Random batched reads: any rows of a teacher, in any order, with repeats.

    cache = open_cache("cache/")
    rows = cache.rows(["coco/0001.jpg"])
    targets = cache["clip"].read(rows)         # TeacherTargets
    targets.to("cuda").tokens_BND              # decoded there; int8 is what crossed the bus

Uncompressed Zarr shards on a local disk are mapped and copied from straight into the batch;
compressed ones go through TensorStore with all rows of the batch in flight. Both give the same
bytes. No teacher, no GPU and no network are needed.

Legend: B batch, N tokens, D channels, H heads.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import tensorstore
import torch
import zarr
from torch import Tensor

from movekd.cache import layout
from movekd.cache.catalog import open_catalog
from movekd.cache.codec import ChannelStats
from movekd.cache.grid import grid_side
from movekd.cache.layout import ArrayLayout, TeacherLayout
from movekd.cache.mapped import MappedShard
from movekd.cache.seal import read_sealed
from movekd.cache.spec import CacheSpec
from movekd.cache.targets import TeacherTargets
from movekd.cache.writer import CALIBRATION, Calibration, read_calibration
from movekd.config import validate
from movekd.corpus.index import find_rows, require_known
from movekd.errors import CacheError, CorruptCacheError, did_you_mean

Rows = npt.NDArray[np.int64] | Sequence[int]


class FeatureCache:
    """A cache opened for reading. Made by ``open_cache``."""

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir
        self.catalog = open_catalog(cache_dir)
        self.geometry = self.catalog.geometry
        self.teachers: tuple[str, ...] = tuple(
            path.name.removesuffix(".seals")
            for path in sorted(cache_dir.glob("*.seals"))
            if (path / CALIBRATION).exists()
        )
        self._opened: dict[str, TeacherCache] = {}

    @property
    def keys(self) -> pa.ChunkedArray:
        """Key of each image, in row order (Arrow strings)."""
        return self.catalog.index["key"]

    def rows(self, names: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Return the row of each name or key.

        Raises:
            UnknownKeyError: names some that the cache does not hold.
        """
        rows = self.find_rows(names, view)
        require_known(names, rows, f"the cache {self.cache_dir}")
        return rows

    def find_rows(self, names: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Return the row of each name or key, -1 where the cache does not hold it."""
        index = self.catalog.index
        if view != 0:
            index = index.filter(pc.equal(index["view"], view))
        found = find_rows(names, index["key"], self.catalog.names)
        rows = np.asarray(index["row"])
        return np.where(found >= 0, rows[found], -1) if len(rows) else found

    def __getitem__(self, teacher: str) -> "TeacherCache":
        if teacher not in self._opened:
            if teacher not in self.teachers:
                raise CacheError(
                    f"{self.cache_dir} holds no teacher '{teacher}'."
                    f"{did_you_mean(teacher, self.teachers)} It holds: "
                    f"{', '.join(self.teachers) or 'none'}. Add it with "
                    f"`movekd cache build --teacher {teacher}`."
                )
            self._opened[teacher] = TeacherCache(self.cache_dir, teacher, self.catalog.num_rows)
        return self._opened[teacher]

    def __iter__(self) -> Iterator[str]:
        return iter(self.teachers)


def open_cache(cache_dir: str | Path) -> FeatureCache:
    """Open a cache for reading.

    Raises:
        CacheError: there is none, or it is of another format version.
        CorruptCacheError: its index is damaged.
    """
    return FeatureCache(Path(cache_dir))


class TeacherCache:
    """One teacher's features. Thread-safe; usable after fork and after pickling (spawn)."""

    def __init__(self, cache_dir: Path, teacher: str, num_rows: int) -> None:
        self.cache_dir, self.teacher, self.num_rows = cache_dir, teacher, num_rows
        self._lock = threading.Lock()
        self._maps: dict[tuple[str, int], MappedShard] = {}
        self._stores: dict[str, Any] = {}
        group = _open_group(layout.group_dir(cache_dir, teacher))
        self.spec: CacheSpec = validate(CacheSpec, group["spec"], f"attributes of {teacher}.zarr")
        calibration = read_calibration(cache_dir, teacher)
        if calibration is None or calibration.spec_fingerprint != self.spec.fingerprint:
            raise CacheError(
                f"the calibration of '{teacher}' in {cache_dir} was sealed for another spec than "
                "the group's attributes hold; rebuild this teacher."
            )
        self.calibration: Calibration = calibration
        self.layout: TeacherLayout = calibration.layout(self.spec)
        self.stats = _read_stats(layout.group_dir(cache_dir, teacher))
        self._sealed = np.zeros(self.layout.num_shards(num_rows), bool)
        for shard in range(len(self._sealed)):
            self._sealed[shard] = layout.seal_path(cache_dir, teacher, shard).exists()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_maps": {}, "_stores": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    @property
    def grid(self) -> int:
        """Side of the stored grid."""
        return grid_side(self.layout.num_tokens)

    @property
    def width(self) -> int:
        """Channels a token."""
        return self.layout.width

    @property
    def missing_shards(self) -> list[int]:
        """Zarr shards without a seal: to be built."""
        return np.flatnonzero(~self._sealed).tolist()

    @property
    def is_complete(self) -> bool:
        """Whether every Zarr shard is sealed."""
        return bool(self._sealed.all())

    @cached_property
    def seals(self) -> dict[int, dict[str, Any]]:
        """The content of every seal, Zarr shard -> seal, checked against its own checksum."""
        return {
            int(shard): read_sealed(layout.seal_path(self.cache_dir, self.teacher, int(shard)))
            for shard in np.flatnonzero(self._sealed)
        }

    @property
    def skipped(self) -> dict[int, str]:
        """Rows whose image could not be read, and why; their features are NaN."""
        skips = (seal["skipped"].items() for seal in self.seals.values())
        return {int(row): reason for items in skips for row, reason in items}

    def read(self, rows: Rows, out: Mapping[str, Tensor] | None = None) -> TeacherTargets:
        """Return the features of ``rows`` in the order asked, as stored; repeats are fine.

        Args:
            rows: row numbers, as ``FeatureCache.rows`` gives them.
            out: tensors of the stored shapes and dtypes to read into, ``empty(len(rows))`` for
                one; new ones unless given. A fresh allocation a batch costs more in page
                faults than the copy.

        Raises:
            CacheError: a row is out of range, or was not built yet.
            CorruptCacheError: a Zarr shard is shorter than its index says.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        self._check(wanted)
        stored = self.empty(len(wanted)) if out is None else out
        for array in self.layout.arrays.values():
            into = stored[array.name]
            if tuple(into.shape) != (len(wanted), *array.row_shape):
                raise CacheError(
                    f"out['{array.name}'] has shape {tuple(into.shape)}; expected "
                    f"{(len(wanted), *array.row_shape)}: allocate it with `empty({len(wanted)})`."
                )
            if self.spec.compressor == "none":
                self._read_mapped(array, wanted, into.numpy())
            else:
                self._read_tensorstore(array, wanted, into.numpy())
        return TeacherTargets(stored, self.stats)

    def empty(self, num_rows: int, pin_memory: bool = False) -> dict[str, Tensor]:
        """Return uninitialised buffers for ``read(rows, out=...)``."""
        return {
            array.name: torch.empty(
                (num_rows, *array.row_shape),
                dtype=getattr(torch, array.dtype),
                pin_memory=pin_memory,
            )
            for array in self.layout.arrays.values()
        }

    def _check(self, rows: npt.NDArray[np.int64]) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            bad = rows[(rows < 0) | (rows >= self.num_rows)][0]
            raise CacheError(f"row {bad} is outside of {self.cache_dir}: 0..{self.num_rows - 1}.")
        unsealed = rows[~self._sealed[rows // self.layout.rows_per_shard]]
        if len(unsealed):
            raise CacheError(
                f"row {unsealed[0]} of teacher '{self.teacher}' in {self.cache_dir} is not built "
                f"yet ({len(self.missing_shards)} of {len(self._sealed)} Zarr shards are missing); "
                "run the same `movekd cache build` again to finish it."
            )

    def _read_mapped(
        self, array: ArrayLayout, rows: npt.NDArray[np.int64], into: npt.NDArray[Any]
    ) -> None:
        shards, offsets = np.divmod(rows, self.layout.rows_per_shard)
        picked = [
            (self._map(array, shard), offset)
            for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True)
        ]
        for shard_map, offset in picked:  # a cache of terabytes is never in memory: announce all
            shard_map.announce(offset)
        for position, (shard_map, offset) in enumerate(picked):
            into[position] = shard_map.row(offset)

    def _map(self, array: ArrayLayout, shard: int) -> "MappedShard":
        mapped = self._maps.get((array.name, shard))
        if mapped is None:
            path = layout.group_dir(self.cache_dir, self.teacher) / layout.shard_file(array, shard)
            with self._lock:
                mapped = MappedShard(path, array, self.layout.rows_per_shard)
                self._maps[array.name, shard] = mapped
        return mapped

    def _read_tensorstore(
        self, array: ArrayLayout, rows: npt.NDArray[np.int64], into: npt.NDArray[Any]
    ) -> None:
        global _tensorstore_pid
        folder = layout.group_dir(self.cache_dir, self.teacher) / array.name
        if _tensorstore_pid not in (None, os.getpid()):
            _read_zarr(folder, rows, into)
            return
        _tensorstore_pid = os.getpid()
        with self._lock:
            store = self._stores.get(array.name)
            if store is None:
                store = tensorstore.open(
                    {
                        "driver": "zarr3",
                        "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"},
                        "recheck_cached_data": "open",
                        "recheck_cached_metadata": "open",
                    },
                    context=_TENSORSTORE_CONTEXT,
                    read=True,
                    open=True,
                ).result()
                self._stores[array.name] = store
        try:
            reads = [store[int(row)].read() for row in rows]
            for position, future in enumerate(reads):
                into[position] = future.result()
        except ValueError as error:
            raise CorruptCacheError(
                f"{array.name} of teacher '{self.teacher}' in {self.cache_dir} cannot be decoded: "
                f"{str(error).splitlines()[0][:300]}. Run `movekd cache verify`."
            ) from None


_TENSORSTORE_CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 32 * 2**20}})
"""Keeps the shards' indexes, so that a row costs one range read instead of two."""


_tensorstore_pid: int | None = None
"""The process that has read through TensorStore: it aborts a forked child that goes on with it."""


def _read_zarr(folder: Path, rows: npt.NDArray[np.int64], into: npt.NDArray[Any]) -> None:
    """Read rows one after the other through zarr: slower, but it survives a fork."""
    try:
        array = zarr.open_array(folder, mode="r")
        for position, row in enumerate(rows):
            into[position] = array[int(row)]
    except Exception as error:  # zarr has no common base of what damaged bytes can raise
        raise CorruptCacheError(
            f"{folder} cannot be decoded: {str(error)[:300]}. Run `movekd cache verify`."
        ) from None


def _open_group(path: Path) -> dict[str, Any]:
    """Return movekd's attributes of a teacher's group, checked."""
    try:
        attributes: dict[str, Any] = dict(zarr.open_group(path, mode="r").attrs["movekd"])
    except Exception:  # zarr has no common base of what damaged metadata can raise
        raise CorruptCacheError(
            f"{path} is not a Zarr group with movekd's attributes; rebuild this teacher."
        ) from None
    if attributes.get("format_version") != layout.FORMAT_VERSION:
        raise CacheError(
            f"{path} is of format {attributes.get('format_version')}; this movekd reads format "
            f"{layout.FORMAT_VERSION}."
        )
    return attributes


def _read_stats(group: Path) -> ChannelStats:
    names = ("channel_mean", "channel_std")
    try:
        parts = [zarr.open_array(group / name, mode="r")[:] for name in names]
    except Exception:  # as above
        raise CorruptCacheError(
            f"channel_mean or channel_std of {group} cannot be read; rebuild this teacher."
        ) from None
    mean, std = (torch.from_numpy(np.array(part, np.float32)) for part in parts)
    return ChannelStats(mean, std)
