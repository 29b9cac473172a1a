"""Compare Zarr shards with their seals, and the seals with the catalog, before a row is read.

Input: the rows that will be read. Output: an error, or nothing. Each Zarr shard is compared once
per process: when it is read first. So reading a row costs one look-up, and a cache whose files were
exchanged, cut or lengthened gives no features of other images.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from movekd.cache import layout
from movekd.cache.catalog import Catalog, open_catalog
from movekd.cache.schema import ShardSeal
from movekd.cache.seal import blocks_of, entry
from movekd.cache.storage import open_regular
from movekd.errors import CacheError, CorruptCacheError
from movekd.files.ownership import FileEntry

if TYPE_CHECKING:
    from movekd.cache.contents import TeacherContents

Verify = Literal["size", "checksum"]
"""What is compared with a seal: the sizes of its files, or all of their bytes."""


class SealedShards:
    """Which Zarr shards of a teacher were compared in this process. Thread-safe.

    Two threads may compare the same Zarr shard at the same time; both then wait for their own
    comparison, so neither returns a row before.

    Args:
        teacher: the teacher.
        catalog: of its cache.
        verify: what is compared.
    """

    def __init__(self, teacher: "TeacherContents", catalog: Catalog, verify: Verify) -> None:
        self._teacher, self._verify = teacher, verify
        self._catalog: Catalog | None = catalog
        self._is_compared = np.zeros(teacher.layout.num_shards(teacher.num_rows), bool)

    def __getstate__(self) -> Mapping[str, Any]:
        # the catalog holds open files, and another process compares for itself
        fresh = {"_catalog": None, "_is_compared": np.zeros_like(self._is_compared)}
        return self.__dict__ | fresh

    def require(self, rows: npt.NDArray[np.int64]) -> None:
        """Compare the Zarr shards of these rows, unless they were.

        Raises:
            CacheError: a Zarr shard is not built yet, or was sealed for other images.
            CorruptCacheError: a file is missing, or not what its seal says.
        """
        shards = rows // self._teacher.layout.rows_per_shard
        is_new = ~self._is_compared[shards]
        if not is_new.any():
            return
        teacher, new = self._teacher, np.unique(shards[is_new])
        if missing := set(teacher.missing_shards) & set(new.tolist()):
            row = rows[np.isin(shards, list(missing))][0]
            raise CacheError(
                f"row {row} of teacher '{teacher.teacher}' in {teacher.storage.url} is not built "
                f"yet ({len(teacher.missing_shards)} of {len(self._is_compared)} Zarr shards are "
                "missing); run the same `movekd cache build` again to finish it."
            )
        if self._catalog is None:
            self._catalog = open_catalog(teacher.storage)
        calibration = teacher.calibration.hash
        spans, keys = self._catalog.zarr_shards(teacher.layout.rows_per_shard)
        for shard, seal in teacher.read_seals(new.tolist()):
            if seal.rows != spans[shard].tolist() or seal.keys_xxh3_128 != keys[shard].decode():
                raise CacheError(teacher.other_images([shard]))
            if seal.calibration != calibration:
                raise CacheError(teacher.other_calibration([shard]))
            self._require_files(shard, seal)
            self._is_compared[shard] = True

    def accept(self, shards: npt.NDArray[np.int64]) -> None:
        """Take Zarr shards as compared, whose seals were read for another reason.

        Only if nothing else is compared: the files of an object store, by size. Their seals then
        cost no second request.
        """
        if self._verify == "size" and self._teacher.storage.local_dir is None:
            self._is_compared[shards] = True

    def _require_files(self, shard: int, seal: ShardSeal) -> None:
        teacher = self._teacher
        for array in teacher.layout.arrays.values():
            file = layout.shard_file(array, shard)
            name, sealed = f"{layout.group_name(teacher.teacher)}/{file}", seal.files.get(file)
            least = layout.index_bytes(teacher.layout.rows_per_shard)
            if teacher.spec.compressor == "none":
                least += (seal.rows[1] - seal.rows[0]) * array.row_bytes
            if sealed is None or sealed.size_bytes < least:
                raise CorruptCacheError(
                    f"{teacher.storage.url}/{layout.seal_name(teacher.teacher, shard)} lists "
                    f"{f'{sealed.size_bytes} bytes' if sealed else 'no file'} of {array.name}; "
                    f"expected at least {least} bytes. {seal.remedy}"
                )
            if teacher.storage.local_dir is not None:
                _require_size(teacher.storage.local_dir / name, sealed.size_bytes)
            if self._verify == "checksum":
                self._require_checksum(name, sealed)

    def _require_checksum(self, name: str, sealed: FileEntry) -> None:
        where = f"{self._teacher.storage.url}/{name}"
        folder = self._teacher.storage.local_dir
        try:
            if folder is None:
                found = entry(self._teacher.storage.blocks(name))
            else:
                with open_regular(f"{folder}/{name}") as file:
                    found = entry(blocks_of(file))
        except OSError:  # it was there a moment ago
            raise CorruptCacheError(
                f"{where} is sealed but does not exist. Run `movekd cache verify`."
            ) from None
        if found != sealed:
            raise CorruptCacheError(
                f"{where} is damaged: {found.size_bytes} bytes with checksum {found.xxh3_128}; its "
                f"seal says {sealed.size_bytes} bytes with {sealed.xxh3_128}. Delete its seal and "
                "build again."
            )


def _require_size(path: Path, size_bytes: int) -> None:
    """Raise CorruptCacheError unless a regular file has this size."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise CorruptCacheError(
            f"{path} is sealed but cannot be opened ({error.strerror}). Run `movekd cache verify`."
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise CorruptCacheError(
            f"{path} is sealed but is no regular file. Run `movekd cache verify`."
        )
    if found.st_size != size_bytes:
        what = "is truncated" if found.st_size < size_bytes else "is longer than what was built"
        raise CorruptCacheError(
            f"{path} has {found.st_size} bytes, its seal says {size_bytes}: it {what}. Run "
            "`movekd cache verify`."
        )
