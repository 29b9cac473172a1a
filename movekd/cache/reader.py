"""Read any rows of a teacher from a cache, in any order, with repeats.

    cache = open_cache("cache/")
    rows = cache.rows(["coco/0001.jpg"])
    targets = cache["clip"].read(rows)         # TeacherTargets
    targets.to("cuda").tokens_BND              # decoded on the GPU: the stored bytes cross the bus

``mapped_rows`` reads uncompressed rows on a local disk, ``tensorstore_rows`` all others. Both
return the same bytes. Reading needs no teacher and no GPU.

Legend: B batch, N tokens, D channels, H heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from movekd.cache import layout
from movekd.cache.codecs import codec
from movekd.cache.contents import CacheContents, TeacherContents
from movekd.cache.mapped_rows import MappedRows
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage, open_storage
from movekd.cache.targets import TeacherTargets
from movekd.cache.tensorstore_rows import TensorStoreRows
from movekd.corpus.index import find_rows, require_known
from movekd.errors import CacheError, UnknownKeyError

Rows = npt.NDArray[np.int64] | Sequence[int]


class FeatureCache(CacheContents):
    """A cache opened for reading. ``open_cache`` returns it.

    ``cache["clip"]`` is a ``TeacherCache``; iterating over the cache yields the teachers' names.

    Attributes:
        storage: where the cache lies.
        catalog: which image each row holds.
        geometry: how every image became a square.
        views: which views of an image have rows, ``base`` or ``anyres``.
        teachers: names of the teachers whose calibration is sealed.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self._opened: dict[str, TeacherCache] = {}

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """Key of each image in row order, as Arrow strings; read on first use."""
        keys = self.catalog.index["key"]
        return keys if self.views == "base" else keys.filter(pa.array(self.catalog.views == 0))

    def rows(self, names: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Return the row of a view of each name or key; view 0 is the whole image.

        Raises:
            UnknownKeyError: the cache does not hold some of them, or not this view of them.
        """
        rows = self.find_rows(names, view)
        if view != 0 and (rows < 0).any():
            require_known(names, self.find_rows(names), f"the cache {self.url}")
            without = pa.array(names, pa.string()).filter(pa.array(rows < 0)).unique()
            raise UnknownKeyError(
                f"the cache {self.url} holds no view {view} of {without[0].as_py()!r}"
                f"{' ...' if len(without) > 1 else ''} ({len(without)} images); its views are "
                f"'{self.views}'. Ask for view 0, or call find_rows, which returns -1 for those."
            )
        require_known(names, rows, f"the cache {self.url}")
        return rows

    def find_rows(self, names: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Return the row of a view of each name or key; -1 if the cache does not hold it."""
        places = find_rows(names, self.catalog.index, self.catalog.names)
        if view != 0:  # an image's views follow its base view
            views = self.catalog.views
            there = places + min(max(view, -1), len(views))  # a larger int fits no int64
            is_there = (places >= 0) & (there >= 0) & (there < len(views))
            is_there[is_there] = views[there[is_there]] == view
            places = np.where(is_there, there, -1)
        if not self.catalog.has_gaps:
            return places
        return np.where(places >= 0, self.catalog.rows[places], -1)

    def __getitem__(self, teacher: str) -> "TeacherCache":
        if teacher not in self._opened:
            self.require(teacher)
            catalog = self.catalog
            images = catalog.rows if catalog.has_gaps else None
            self._opened[teacher] = TeacherCache(self.storage, teacher, catalog.num_rows, images)
        return self._opened[teacher]

    def __iter__(self) -> Iterator[str]:
        return iter(self.teachers)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.storage,)  # the other process opens it again


def open_cache(url: str | Path | Storage) -> FeatureCache:
    """Open a cache for reading.

    Args:
        url: a folder, or ``s3://bucket/prefix``, ``gs://``, ``file://``, ``memory://``.

    Raises:
        CacheError: the place holds no cache, or one of another format version.
        CorruptCacheError: its index is damaged.
    """
    return FeatureCache(open_storage(url))


class TeacherCache(TeacherContents):
    """One teacher's features. Thread-safe; usable after fork and after pickling (spawn).

    ``cache["clip"]`` of a ``FeatureCache`` returns it.

    Attributes:
        stats: channel_mean and channel_std as tensors, float32 (D,).
    """

    def __init__(
        self,
        storage: Storage,
        teacher: str,
        num_rows: int,
        images: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Open one teacher; ``images`` are the rows that hold an image, if some hold none."""
        super().__init__(storage, teacher, num_rows)
        self._images = images
        self.stats = ChannelStats.from_numpy(self.channel_mean, self.channel_std)
        self._rows = self._open_rows()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._open_rows()

    def _open_rows(self) -> MappedRows | TensorStoreRows:
        if self.storage.local_dir is not None and self.spec.compressor == "none":
            group = self.storage.local_dir / layout.group_name(self.teacher)
            return MappedRows(group, self.layout)
        return TensorStoreRows(self.storage, self.teacher, self.layout)

    def read(self, rows: Rows, out: Mapping[str, Tensor] | None = None) -> TeacherTargets:
        """Return the features of ``rows`` in the order asked, as stored; repeats are fine.

        Args:
            rows: row numbers, as ``FeatureCache.rows`` gives them.
            out: tensors of the stored shapes and dtypes to read into, as ``empty(len(rows))``
                returns them. Default: new ones; their page faults cost more than the copy.

        Raises:
            CacheError: a row is out of range, or was not built yet.
            CorruptCacheError: a Zarr shard is missing or damaged.
        """
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise CacheError(
                f"rows are {wanted.dtype} of shape {wanted.shape}; expected integers in one "
                "dimension, as `cache.rows(names)` gives them."
            )
        wanted = wanted.astype(np.int64, copy=False)
        self._check(wanted)
        stored = self.empty(len(wanted)) if out is None else out
        for array in self.layout.arrays.values():
            found, expected = stored.get(array.name), (len(wanted), *array.row_shape)
            kind = getattr(torch, array.dtype)
            if (
                found is None
                or tuple(found.shape) != expected
                or found.dtype != kind
                or found.device.type != "cpu"
            ):
                what = "missing" if found is None else f"{found.dtype} of {tuple(found.shape)}"
                what += f" on {found.device}" if found is not None else ""
                raise CacheError(
                    f"out['{array.name}'] is {what}; expected {kind} of {expected} on cpu: "
                    f"allocate it with `empty({len(wanted)})`."
                )
        self._rows.read(wanted, {name: stored[name].numpy() for name in self.layout.arrays})
        return TeacherTargets(stored, self.stats, codec(self.spec.codec))

    def empty(self, num_rows: int) -> dict[str, Tensor]:
        """Return uninitialised buffers for ``read(rows, out=...)``."""
        return {
            name: torch.empty((num_rows, *array.row_shape), dtype=getattr(torch, array.dtype))
            for name, array in self.layout.arrays.items()
        }

    def _check(self, rows: npt.NDArray[np.int64]) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            bad = rows[(rows < 0) | (rows >= self.num_rows)][0]
            raise CacheError(f"row {bad} is outside of {self.storage.url}: 0..{self.num_rows - 1}.")
        if self._images is not None and len(rows):
            places = np.searchsorted(self._images, rows).clip(max=len(self._images) - 1)
            if (gap := rows[self._images[places] != rows]).size:
                raise CacheError(
                    f"row {gap[0]} of {self.storage.url} stands for no image: it lies in the gap "
                    "before appended images. Take rows from `cache.rows(names)`."
                )
        unsealed = rows[~self._sealed[rows // self.layout.rows_per_shard]]
        if len(unsealed):
            raise CacheError(
                f"row {unsealed[0]} of teacher '{self.teacher}' in {self.storage.url} is not built "
                f"yet ({len(self.missing_shards)} of {len(self._sealed)} Zarr shards are missing); "
                "run the same `movekd cache build` again to finish it."
            )
