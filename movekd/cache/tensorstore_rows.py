"""Read rows of compressed caches and of object stores through TensorStore.

All ranges of a batch are requested before the first one is waited for. ``zarr`` reads the rows one
after the other in two cases that TensorStore cannot serve: a process forked after its parent read
through TensorStore (it would abort), and ``memory://`` (only fsspec of this process knows it).

Uncompressed rows on a local disk are read by ``mapped_rows``, which is faster for them.
"""

import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore
import zarr

from movekd.cache import layout
from movekd.cache.codecs import ArrayLayout
from movekd.cache.layout import TeacherLayout
from movekd.cache.object_storage import ObjectStorage, s3_settings
from movekd.cache.schema import ArrayMetadata
from movekd.cache.seal import MAX_JSON_BYTES
from movekd.cache.storage import Storage
from movekd.config import validate
from movekd.errors import CacheError, ConfigError, CorruptCacheError, shorten
from movekd.files.reading import parse_json

_CONTEXT = {
    # keeps the indexes of Zarr shards: a row then costs one range per array, not two
    "cache_pool": {"total_bytes_limit": 32 * 2**20},
    # TensorStore's defaults retry for many minutes
    "s3_request_retries": {"max_retries": 6, "initial_delay": "100ms", "max_delay": "4s"},
    "gcs_request_retries": {"max_retries": 6, "initial_delay": "100ms", "max_delay": "4s"},
}
_used_in: int | None = None
"""The process that has read through TensorStore: a forked child that uses it again aborts."""


class TensorStoreRows:
    """Rows of one teacher's group, local or remote, compressed or not. Thread-safe."""

    def __init__(self, storage: Storage, teacher: str, teacher_layout: TeacherLayout) -> None:
        self._storage, self._teacher, self._layout = storage, teacher, teacher_layout
        self._lock = threading.Lock()
        self._stores: dict[str, Any] = {}

    def read(self, rows: npt.NDArray[np.int64], into: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy every array of each row to its place in ``into``.

        Raises:
            CorruptCacheError: a sealed file is missing or cannot be decoded.
            CacheError: the object store does not answer.
        """
        global _used_in
        kvstore = kvstore_spec(self._storage, layout.group_name(self._teacher))
        if kvstore is None or _used_in not in (None, os.getpid()):
            self._read_one_by_one(rows, into)
            return
        _used_in = os.getpid()
        try:
            reads: list[tuple[npt.NDArray[Any], int, Any]] = []
            for name in self._layout.arrays:
                store = self._store(name, kvstore)
                reads += [(into[name], i, store[row].read()) for i, row in enumerate(rows.tolist())]
            for _ in range(len(reads)):  # each is freed after its copy: one batch is in memory
                array, position, future = reads.pop()
                array[position] = future.result()
        except (ValueError, IndexError, OverflowError, NotImplementedError) as error:
            raise self._error(str(error)) from None

    def _store(self, array: str, kvstore: dict[str, Any]) -> Any:
        with self._lock:
            if array not in self._stores:
                self._require_metadata(self._layout.arrays[array])
                if "context" not in self._stores:
                    self._stores["context"] = tensorstore.Context(_CONTEXT)
                self._stores[array] = tensorstore.open(
                    {
                        "driver": "zarr3",
                        "kvstore": kvstore | {"path": f"{kvstore['path']}{array}/"},
                        "recheck_cached_data": "open",
                        "recheck_cached_metadata": "open",
                        "fill_missing_data_reads": False,
                    },
                    context=self._stores["context"],
                    read=True,
                    open=True,
                ).result()
            return self._stores[array]

    def _read_one_by_one(
        self, rows: npt.NDArray[np.int64], into: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        group = layout.group_name(self._teacher)
        shards = np.unique(rows // self._layout.rows_per_shard).tolist()
        for array in self._layout.arrays.values():
            self._require_metadata(array)
            for shard in shards:  # zarr would read a missing file as the fill value
                if not self._storage.exists(f"{group}/{layout.shard_file(array, shard)}"):
                    raise self._error(f"Zarr shard {shard} of {array.name} is missing")
            try:
                opened = zarr.open_array(
                    zarr_store(self._storage, f"{group}/{array.name}"), mode="r"
                )
                for position, row in enumerate(rows.tolist()):
                    into[array.name][position] = opened[row]
            except Exception as error:  # zarr raises errors of many kinds for damaged bytes
                # raises the right error if the object store does not answer
                self._storage.exists(layout.metadata_name(self._teacher))
                raise self._error(str(error)) from None

    def _require_metadata(self, array: ArrayLayout) -> None:
        """Raise CorruptCacheError unless zarr.json says what movekd writes for this array.

        Both libraries read by it: with another data type they would convert every value.
        """
        name = f"{layout.group_name(self._teacher)}/{array.name}/zarr.json"
        where, remedy = f"{self._storage.url}/{name}", "Run `movekd cache verify`."
        try:
            raw = self._storage.read(name, MAX_JSON_BYTES)
            content = parse_json(raw, where, error=CorruptCacheError, remedy=remedy)
            metadata = validate(ArrayMetadata, content, where)
        except FileNotFoundError:
            raise CorruptCacheError(f"{where} does not exist. {remedy}") from None
        except ConfigError as error:
            raise CorruptCacheError(f"{shorten(error, 1000)}. {remedy}") from None
        if not metadata.fits(array, self._layout.rows_per_shard):
            raise CorruptCacheError(
                f"{where} describes another array than the {array.dtype} of "
                f"{('row', *array.row_shape)} that the calibration settles. {remedy}"
            )

    def _error(self, reason: str) -> CacheError:
        where = f"teacher '{self._teacher}' in {self._storage.url}"
        first = shorten(reason.splitlines()[0], 300) if reason else "no reason given"
        if self._storage.local_dir is None and first.startswith(
            ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "UNKNOWN", "PERMISSION_DENIED")
        ):
            return CacheError(
                f"{where} cannot be read: {first}. It was tried several times; check the endpoint, "
                "the credentials and the network."
            )
        return CorruptCacheError(f"{where} cannot be decoded: {first}. Run `movekd cache verify`.")


def kvstore_spec(storage: Storage, folder: str) -> dict[str, Any] | None:
    """Return TensorStore's spec of a folder of a cache; None if TensorStore cannot open it."""
    if storage.local_dir is not None:
        return {"driver": "file", "path": f"{(storage.local_dir / folder).resolve()}/"}
    assert isinstance(storage, ObjectStorage)
    bucket, prefix = storage.bucket_and_prefix
    place = {"bucket": bucket, "path": f"{prefix}/{folder}/".lstrip("/")}
    if storage.scheme == "gs":
        return {"driver": "gcs", **place}
    if storage.scheme == "s3":
        return {"driver": "s3", **place, **s3_settings()}
    return None


def zarr_store(storage: Storage, folder: str) -> Any:
    """Return the store through which zarr opens a folder of a cache."""
    if storage.local_dir is not None:
        return storage.local_dir / folder
    assert isinstance(storage, ObjectStorage)
    return zarr.storage.FsspecStore.from_url(
        f"{storage.url}/{folder}", storage_options=storage.options
    )
