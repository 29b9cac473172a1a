"""What of a cache is finished, and what its seals say: everything but the features themselves.

``reader`` adds the features; ``check``, which is behind `movekd cache ls` and `verify`, needs none.
There is no torch here: it takes as long to load as fifty thousand seals to read.
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
from movekd.cache.writer import read_calibration
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
        """Return what is sealed of one teacher, looked up anew.

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


def open_contents(url: str | Path | Storage) -> CacheContents:
    """Open a cache to look at what is sealed; raises as ``open_cache`` does."""
    return CacheContents(open_storage(url))


@dataclass(frozen=True)
class SealSums:
    """What all seals of a teacher say, an array a figure: S Zarr shards."""

    shards_S: npt.NDArray[np.int64]
    rows_S2: npt.NDArray[np.int64]
    """First row, and last row plus one."""
    keys_S: npt.NDArray[np.bytes_]
    """``ShardSeal.keys_xxh3_128``."""
    size_bytes_S: npt.NDArray[np.int64]
    error_mean_S: npt.NDArray[np.float64]
    error_max_S: npt.NDArray[np.float64]
    num_tokens_S: npt.NDArray[np.int64]
    """How many tokens the errors are of."""
    skipped: dict[int, str]
    """Row without features -> why."""


class TeacherContents:
    """One teacher of a cache: its spec, its calibration, and which Zarr shards are finished.

    Attributes:
        storage: the cache.
        teacher: the name.
        num_rows: length of its arrays.
        spec: what it was built by.
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
    def seals(self) -> dict[int, ShardSeal]:
        """The content of every seal, Zarr shard -> seal; ``sums`` takes a twentieth of the room."""
        return dict(self._read_seals())

    @cached_property
    def sums(self) -> SealSums:
        """What all seals say, in arrays; each is checked against its own checksum."""
        shards, rows, keys, sizes, means, maxima, tokens = ([] for _ in range(7))
        skipped: dict[int, str] = {}
        for shard, seal in self._read_seals():
            shards.append(shard)
            rows.append(seal.rows)
            keys.append(seal.keys_xxh3_128)
            sizes.append(sum(file.size_bytes for file in seal.files.values()))
            means.append(seal.error.mean)
            maxima.append(seal.error.max)
            tokens.append(seal.error.num_tokens)
            skipped |= {int(row): reason for row, reason in seal.skipped.items()}
        return SealSums(
            np.array(shards, np.int64),
            np.array(rows, np.int64).reshape(-1, 2),
            np.array(keys, np.bytes_),
            np.array(sizes, np.int64),
            np.array(means, np.float64),
            np.array(maxima, np.float64),
            np.array(tokens, np.int64),
            skipped,
        )

    def _read_seals(self) -> Iterator[tuple[int, ShardSeal]]:
        """Yield every Zarr shard's seal, some of them read together."""
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
        """Refuse features that were sealed for other images than the catalog's rows are.

        Only a catalog or seals from elsewhere can be so: nothing in the features would tell.

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

    The small files that hold them are read together, and held against their seal.
    """
    where = f"{storage.url}/{layout.group_name(teacher)}"
    sealed = read_record(storage, layout.metadata_name(teacher), GroupRecord).files
    statistics = [f"{array}/c/0" for array in CHANNEL_ARRAYS]  # one chunk each, float32 as it is
    wanted = ["zarr.json", *(f"{array}/zarr.json" for array in CHANNEL_ARRAYS), *statistics]
    raw = storage.read_many([f"{layout.group_name(teacher)}/{name}" for name in wanted])
    files = {name.partition("/")[2]: content for name, content in raw.items()}
    for name in wanted:  # these and no others, whatever names the seal holds
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
