"""Read any rows of a teacher from a cache, in any order, with repeats.

    cache = open_cache("cache/")
    rows = cache.rows(["coco/0001.jpg"])
    targets = cache["clip"].read(rows)         # TeacherTargets
    targets.to("cuda").tokens_BND              # decoded on the GPU: the stored bytes cross the bus

``mapped_rows`` reads uncompressed rows on a local disk, ``tensorstore_rows`` all others. Both
return the same bytes. Reading needs no teacher and no GPU. The first read of a Zarr shard in a
process compares its seal with the catalog, and its files with its seal.

Legend: B batch, N tokens, D channels, H heads.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from movekd.cache import layout
from movekd.cache.buffers import require_buffers
from movekd.cache.catalog import Catalog
from movekd.cache.codecs import codec
from movekd.cache.contents import CacheContents, TeacherContents
from movekd.cache.mapped_rows import MappedRows
from movekd.cache.sealed_shards import SealedShards, Verify
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage, open_storage
from movekd.cache.targets import TeacherTargets
from movekd.cache.tensorstore_rows import TensorStoreRows
from movekd.corpus.index import find_rows, require_known
from movekd.errors import CacheError, ConfigError, UnknownKeyError, shorten

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
        verify: what the first read of a Zarr shard compares with its seal.
    """

    def __init__(self, storage: Storage, verify: Verify = "size") -> None:
        super().__init__(storage)
        self.verify: Verify = verify
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
            CacheError: the names are no list of strings, or the view is no integer.
        """
        asked = _as_names(names)
        rows = self.find_rows(asked, view)
        if view != 0 and (rows < 0).any():
            require_known(asked, self.find_rows(asked), f"the cache {self.url}")
            without = asked.filter(pa.array(rows < 0)).unique()
            raise UnknownKeyError(
                f"the cache {self.url} holds no view {view} of {without[0].as_py()!r}"
                f"{' ...' if len(without) > 1 else ''} ({len(without)} images); its views are "
                f"'{self.views}'. Ask for view 0, or call find_rows, which returns -1 for those."
            )
        require_known(asked, rows, f"the cache {self.url}")
        return rows

    def find_rows(self, names: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Return the row of a view of each name or key; -1 if the cache does not hold it.

        Raises:
            CacheError: the names are no list of strings, or the view is no integer.
        """
        try:
            view = operator.index(view)
        except TypeError:
            raise CacheError(
                f"view is {shorten(repr(view))}; expected an integer: 0 for the whole image."
            ) from None
        places = find_rows(_as_names(names), self.catalog.index, self.catalog.names)
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
            opened = TeacherCache(self.storage, teacher, self.catalog, self.verify)
            self._opened[teacher] = opened
        return self._opened[teacher]

    def __iter__(self) -> Iterator[str]:
        return iter(self.teachers)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.storage, self.verify)  # the other process opens it again


def open_cache(url: str | Path | Storage, verify: Verify = "size") -> FeatureCache:
    """Open a cache for reading.

    Args:
        url: a folder, or ``s3://bucket/prefix``, ``gs://``, ``file://``, ``memory://``.
        verify: what the first read of a Zarr shard in a process compares with its seal. ``size``
            compares the sizes of its files, which costs next to nothing (in an object store, the
            checksum at the end of each file plays this part). ``checksum`` reads all of its bytes
            once and compares their checksums, so that no damaged row is ever returned.

    Raises:
        CacheError: the place holds no cache, or one of another format version.
        CorruptCacheError: its index is damaged.
        ConfigError: ``url`` or ``verify`` cannot be.
    """
    if url is None or isinstance(url, bytes | int | float | list | tuple | dict):
        raise ConfigError(f"the cache is {shorten(repr(url))}; expected a folder or a URL.")
    if verify not in get_args(Verify):
        raise ConfigError(f"verify is {shorten(repr(verify))}; expected 'size' or 'checksum'.")
    return FeatureCache(open_storage(url), verify)


def _as_names(names: Sequence[str]) -> pa.Array:
    """Return names or keys as Arrow strings. Raises CacheError."""
    try:
        if isinstance(names, str | bytes):
            raise TypeError("a single string")
        return pa.array(names, pa.string())
    except (TypeError, ValueError, NotImplementedError) as error:  # Arrow's errors are these
        raise CacheError(
            f"the names are {shorten(repr(names), 80)} ({shorten(error)}); expected a list of "
            "names or keys, such as ['coco/0001.jpg']."
        ) from None


class TeacherCache(TeacherContents):
    """One teacher's features. Thread-safe; usable after fork and after pickling (spawn).

    ``cache["clip"]`` of a ``FeatureCache`` returns it.

    Attributes:
        stats: the channel statistics, float32 (D,), and the codec's own arrays.
    """

    def __init__(
        self, storage: Storage, teacher: str, catalog: Catalog, verify: Verify = "size"
    ) -> None:
        """Open one teacher of the cache that the catalog belongs to."""
        super().__init__(storage, teacher, catalog.num_rows)
        self.stats = ChannelStats.from_numpy(self.group_arrays)
        self._images = catalog.rows if catalog.has_gaps else None
        self._sealed_shards = SealedShards(self, catalog, verify)
        self._rows = self._open_rows()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._open_rows()

    def require_images(self, catalog: Catalog) -> None:
        """Refuse features of other images than the catalog lists; see ``TeacherContents``."""
        super().require_images(catalog)
        self._sealed_shards.accept(self.sums.shards_S)

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
        wanted = self._require_rows(rows)
        self._sealed_shards.require(wanted)
        stored = self.empty(len(wanted)) if out is None else out
        if out is None:
            into = {name: buffer.numpy() for name, buffer in stored.items()}
        else:
            into = require_buffers(out, self.layout.arrays, len(wanted))
        self._rows.read(wanted, into)
        return TeacherTargets(stored, self.stats, codec(self.codec_name))

    def empty(self, num_rows: int) -> dict[str, Tensor]:
        """Return uninitialised buffers for ``read(rows, out=...)``."""
        return {
            name: torch.empty((num_rows, *array.row_shape), dtype=getattr(torch, array.dtype))
            for name, array in self.layout.arrays.items()
        }

    def _require_rows(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return rows as an array, once each can be read. Raises CacheError."""
        try:
            asked = np.asarray(rows)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            # ragged lists, and tensors with a gradient, of bfloat16, or on a GPU
            raise CacheError(_not_rows(shorten(repr(rows), 80), shorten(error))) from None
        if asked.ndim != 1 or (asked.size and asked.dtype.kind not in "iu"):
            raise CacheError(_not_rows(f"{asked.dtype} of shape {asked.shape}"))
        if asked.size and (asked.min() < 0 or asked.max() >= self.num_rows):
            bad = asked[(asked < 0) | (asked >= self.num_rows)][0]
            raise CacheError(f"row {bad} is outside of {self.storage.url}: 0..{self.num_rows - 1}.")
        wanted: npt.NDArray[np.int64] = asked.astype(np.int64, copy=False)
        if self._images is not None and len(wanted):
            places = np.searchsorted(self._images, wanted).clip(max=len(self._images) - 1)
            if (gap := wanted[self._images[places] != wanted]).size:
                raise CacheError(
                    f"row {gap[0]} of {self.storage.url} stands for no image: it lies in the gap "
                    "before appended images. Take rows from `cache.rows(names)`."
                )
        return wanted


def _not_rows(found: str, reason: str = "") -> str:
    return (
        f"rows are {found}{f' ({reason})' if reason else ''}; expected integers in one dimension, "
        "as `cache.rows(names)` gives them."
    )
