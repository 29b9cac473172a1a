"""Say what of a cache is finished, from its seals. Features are not read.

``reader`` adds the reading of features and ``writer`` their writing; ``verify`` needs neither.
This module loads no torch, because `cache ls` would spend most of its time on that.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from movekd.cache import layout
from movekd.cache.catalog import Catalog, open_catalog
from movekd.cache.layout import CHANNEL_ARRAYS, TeacherLayout, grid_side
from movekd.cache.schema import Calibration, GroupRecord, ShardSeal
from movekd.cache.seal import entry, open_record, read_record
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import Storage, open_storage
from movekd.config import validate
from movekd.errors import CacheError, CorruptCacheError, did_you_mean

_SEALS_AT_ONCE = 1024


class CacheContents:
    """A cache and what is sealed in it."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.catalog = open_catalog(storage)
        self.geometry = self.catalog.geometry
        self.views = self.catalog.view_set
        self.teachers: tuple[str, ...] = tuple(
            folder.removesuffix(".seals")
            for folder in storage.folders()
            if folder.endswith(".seals")
            and storage.exists(layout.calibration_name(folder.removesuffix(".seals")))
        )

    @property
    def url(self) -> str:
        """Where the cache lies: a path, or ``s3://bucket/prefix``."""
        return self.storage.url

    def sealed(self, teacher: str) -> "TeacherContents":
        """Return what is sealed of one teacher; each call looks again.

        Raises:
            CacheError: the cache holds no such teacher.
        """
        self.require(teacher)
        return TeacherContents(self.storage, teacher, self.catalog.num_rows)

    def require(self, teacher: str) -> None:
        """Raise CacheError unless the cache holds this teacher."""
        if teacher not in self.teachers:
            raise CacheError(
                f"{self.url} holds no teacher '{teacher}'."
                f"{did_you_mean(teacher, self.teachers)} It holds: "
                f"{', '.join(self.teachers) or 'none'}. Add it with "
                f"`movekd cache build --teacher {teacher}`."
            )


def read_calibration(storage: Storage, teacher: str) -> Calibration | None:
    """Return the sealed calibration, or None if the teacher has none yet."""
    name = layout.calibration_name(teacher)
    return read_record(storage, name, Calibration) if storage.exists(name) else None


def open_contents(url: str | Path | Storage) -> CacheContents:
    """Open a cache to see what is sealed; raises as ``open_cache``."""
    return CacheContents(open_storage(url))


@dataclass(frozen=True)
class SealSums:
    """What all seals of a teacher say, as one array per figure: S Zarr shards."""

    skipped: dict[int, str]
    """Row without features -> why."""
    shards_S: npt.NDArray[np.int64]
    rows_S2: npt.NDArray[np.int64]
    """First row, and last row plus one."""
    keys_S: npt.NDArray[np.bytes_]
    """``ShardSeal.keys_xxh3_128``."""
    size_bytes_S: npt.NDArray[np.int64]
    file_bytes_SA: npt.NDArray[np.int64]
    """Size of the file of each of A arrays, in the layout's order; -1 if the seal lists none."""
    error_mean_S: npt.NDArray[np.float64]
    error_max_S: npt.NDArray[np.float64]
    num_tokens_S: npt.NDArray[np.int64]
    """Number of tokens behind the errors."""


class TeacherContents:
    """One teacher of a cache: its spec, its calibration, and which Zarr shards are finished.

    Attributes:
        storage: the cache.
        teacher: the name.
        num_rows: length of its arrays.
        spec: the spec that it was built from.
        calibration: what was settled before the first Zarr shard.
        layout: its arrays.
        channel_mean: float32 (D,).
        channel_std: float32 (D,).
    """

    def __init__(self, storage: Storage, teacher: str, num_rows: int) -> None:
        self.storage, self.teacher, self.num_rows = storage, teacher, num_rows
        attributes, (self.channel_mean, self.channel_std) = _open_group(storage, teacher)
        self.spec: CacheSpec = validate(
            CacheSpec, attributes["spec"], f"attributes of {teacher}.zarr"
        )
        calibration = read_calibration(storage, teacher)
        if calibration is None or calibration.spec_fingerprint != self.spec.fingerprint:
            raise CacheError(
                f"the calibration of '{teacher}' in {storage.url} was sealed for another spec than "
                "the group's attributes hold; rebuild this teacher."
            )
        self.calibration: Calibration = calibration
        self.layout: TeacherLayout = calibration.layout(self.spec)
        self._sealed = np.zeros(self.layout.num_shards(num_rows), bool)
        names = set(storage.files(layout.seals_name(teacher)))
        for shard in range(len(self._sealed)):
            self._sealed[shard] = layout.seal_name(teacher, shard) in names

    @property
    def grid(self) -> int:
        """Side of the stored grid."""
        return grid_side(self.layout.num_tokens)

    @property
    def width(self) -> int:
        """Channels per token."""
        return self.layout.width

    @property
    def missing_shards(self) -> list[int]:
        """Zarr shards without a seal; a build will write them."""
        return np.flatnonzero(~self._sealed).tolist()

    @property
    def is_complete(self) -> bool:
        """Whether every Zarr shard is sealed."""
        return bool(self._sealed.all())

    @cached_property
    def seals(self) -> dict[int, ShardSeal]:
        """Every seal, Zarr shard -> seal; ``sums`` takes a twentieth of the memory."""
        return dict(self._read_seals())

    @cached_property
    def sums(self) -> SealSums:
        """What all seals say, in arrays. Each seal is checked against its own checksum."""
        skipped: dict[int, str] = {}
        found: list[tuple[Any, ...]] = []
        arrays = self.layout.arrays.values()
        for shard, seal in self._read_seals():
            size_bytes = sum(file.size_bytes for file in seal.files.values())
            listed = (seal.files.get(layout.shard_file(array, shard)) for array in arrays)
            sizes = tuple(-1 if file is None else file.size_bytes for file in listed)
            error = (seal.error.mean, seal.error.max, seal.error.num_tokens)
            found.append((shard, seal.rows, seal.keys_xxh3_128, size_bytes, sizes, *error))
            skipped |= {int(row): reason for row, reason in seal.skipped.items()}
        columns: Any = np.array(found, f"i8, 2i8, S32, i8, ({len(arrays)},)i8, f8, f8, i8")
        return SealSums(skipped, *(columns[name] for name in columns.dtype.names))

    def _read_seals(self) -> Iterator[tuple[int, ShardSeal]]:
        """Yield the seal of every Zarr shard; many seals are read together."""
        shards = np.flatnonzero(self._sealed).tolist()
        for start in range(0, len(shards), _SEALS_AT_ONCE):
            some = shards[start : start + _SEALS_AT_ONCE]
            names = [layout.seal_name(self.teacher, shard) for shard in some]
            content = self.storage.read_many(names)
            for shard, name in zip(some, names, strict=True):
                where = f"{self.storage.url}/{name}"
                yield shard, open_record(content.get(name, b""), where, ShardSeal)

    @property
    def skipped(self) -> dict[int, str]:
        """Rows whose image could not be read, and why; their features are NaN."""
        return self.sums.skipped

    def require_images(self, catalog: Catalog) -> None:
        """Refuse features that were sealed for other images than the catalog lists.

        That happens when the catalog or the seals come from another cache.

        Raises:
            CacheError: names the Zarr shards.
        """
        sums = self.sums
        expected = np.array(list(catalog.keys_checksums(sums.rows_S2.tolist())), np.bytes_)
        others = sums.shards_S[expected != sums.keys_S].tolist() if len(expected) else []
        if others:
            raise CacheError(
                f"{self.storage.url}/{layout.group_name(self.teacher)}: the Zarr shards "
                f"{', '.join(map(str, others[:5]))}{'...' if len(others) > 5 else ''} were sealed "
                f"for other images than {layout.INDEX} lists; one of the two comes from another "
                "cache. Restore it, or --overwrite the teacher."
            )


def _open_group(
    storage: Storage, teacher: str
) -> tuple[dict[str, Any], list[npt.NDArray[np.float32]]]:
    """Return movekd's attributes of a teacher's group, and channel_mean and channel_std.

    The small files that hold them are read together and checked against their seal.
    """
    where = f"{storage.url}/{layout.group_name(teacher)}"
    sealed = read_record(storage, layout.metadata_name(teacher), GroupRecord).files
    statistics = [f"{array}/c/0" for array in CHANNEL_ARRAYS]  # one chunk each, float32 as it is
    wanted = ["zarr.json", *(f"{array}/zarr.json" for array in CHANNEL_ARRAYS), *statistics]
    raw = storage.read_many([f"{layout.group_name(teacher)}/{name}" for name in wanted])
    files = {name.partition("/")[2]: content for name, content in raw.items()}
    for name in wanted:  # the names in the seal are not trusted
        if name not in files or entry([files[name]]) != sealed.get(name):
            raise CorruptCacheError(
                f"{where}/{name} is not what its seal says; run `movekd cache verify`, and rebuild "
                "this teacher."
            )
    attributes: dict[str, Any] = json.loads(files["zarr.json"])["attributes"]["movekd"]
    if attributes.get("format_version") != layout.FORMAT_VERSION:
        raise CacheError(
            f"{where} is of format {attributes.get('format_version')}; this movekd reads format "
            f"{layout.FORMAT_VERSION}."
        )
    return attributes, [np.frombuffer(files[name], "<f4").copy() for name in statistics]
