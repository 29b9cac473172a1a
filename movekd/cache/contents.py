"""Say what of a cache is finished, from its seals. Features are not read.

``reader`` adds the reading of features and ``writer`` their writing; ``verify`` needs neither.
This module loads no torch, because `cache ls` would spend most of its time on that.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from movekd.cache import layout
from movekd.cache.catalog import Catalog, open_catalog
from movekd.cache.codecs.lowrank import LOWRANK
from movekd.cache.layout import TeacherLayout, grid_side
from movekd.cache.schema import Calibration, GroupMetadata, GroupRecord, ShardSeal
from movekd.cache.seal import MAX_JSON_BYTES, checksum, entry, open_record, read_record
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import Storage, open_storage
from movekd.config import validate
from movekd.errors import CacheError, ConfigError, CorruptCacheError, did_you_mean, shorten
from movekd.files.reading import parse_json

_SEALS_AT_ONCE = 1024
_TEACHER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.seals")


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
            if _TEACHER_NAME.fullmatch(folder)
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
    limited_mean_S: npt.NDArray[np.float64]
    """Errors with values limited to 8 sigma; NaN in seals from before they were recorded."""
    limited_max_S: npt.NDArray[np.float64]
    energy_S: npt.NDArray[np.float64]
    """Energy error; NaN in seals from before it was recorded."""
    num_tokens_S: npt.NDArray[np.int64]
    """Number of tokens behind the errors."""
    calibration_S: npt.NDArray[np.bytes_]
    """``ShardSeal.calibration``."""


class TeacherContents:
    """One teacher of a cache: its spec, its calibration, and which Zarr shards are finished.

    Attributes:
        storage: the cache.
        teacher: the name.
        num_rows: length of its arrays.
        spec: the spec that it was built from.
        calibration: what was settled before the first Zarr shard.
        codec_name: the codec of its tokens; of `codec: lowrank` the rank that was chosen too.
        layout: its arrays.
        group_arrays: the arrays without rows, see ``layout.group_arrays``.
    """

    def __init__(self, storage: Storage, teacher: str, num_rows: int) -> None:
        self.storage, self.teacher, self.num_rows = storage, teacher, num_rows
        group = _Group(storage, teacher)
        self.spec: CacheSpec = group.spec
        calibration = read_calibration(storage, teacher)
        if (
            calibration is None
            or calibration.spec_fingerprint != self.spec.fingerprint
            or (calibration.codec is None) == (self.spec.codec == LOWRANK)
        ):
            raise CacheError(
                f"the calibration of '{teacher}' in {storage.url} was sealed for another spec than "
                "the group's attributes hold; rebuild this teacher."
            )
        self.calibration: Calibration = calibration
        self.codec_name = calibration.codec_of(self.spec)
        self.group_arrays = group.arrays(self.codec_name, calibration.width)
        self._require_statistics()
        self.layout: TeacherLayout = calibration.layout(self.spec)
        self._sealed = np.zeros(self.layout.num_shards(num_rows), bool)
        names = set(storage.files(layout.seals_name(teacher)))
        self._sealed[:] = [layout.seal_name(teacher, s) in names for s in range(len(self._sealed))]

    @property
    def grid(self) -> int:
        """Side of the stored grid."""
        return grid_side(self.layout.num_tokens)

    @property
    def width(self) -> int:
        """Channels per token."""
        return self.layout.width

    @property
    def metadata_files(self) -> list[str]:
        """Files of the group that belong to no Zarr shard, relative to the group."""
        names = (*self.layout.arrays, *self.group_arrays)
        constant = [layout.group_array_file(n, a.ndim) for n, a in self.group_arrays.items()]
        return ["zarr.json", *(f"{name}/zarr.json" for name in names), *constant]

    @property
    def sealed_shards(self) -> list[int]:
        """Zarr shards with a seal, ascending."""
        return np.flatnonzero(self._sealed).tolist()

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
        around = [layout.shard_file(array, 0).partition("/0") for array in arrays]
        for shard, seal in self._read_seals():
            files, made, none = seal.files, seal.error, float("nan")
            listed = [files.get(f"{start}/{shard}{end}") for start, _, end in around]
            sizes = tuple([-1 if file is None else file.size_bytes for file in listed])
            is_all = len(files) == len(sizes) and -1 not in sizes
            size_bytes = sum(sizes if is_all else (file.size_bytes for file in files.values()))
            newer = (made.limited_mean, made.limited_max, made.energy)
            known = [none if error is None else error for error in newer]
            error = (made.mean, made.max, *known, made.num_tokens)
            sealed = (seal.keys_xxh3_128, size_bytes, sizes, *error, seal.calibration)
            found.append((shard, seal.rows, *sealed))
            if seal.skipped:
                skipped |= {int(row): reason for row, reason in seal.skipped.items()}
        kinds = f"i8, 2i8, S32, i8, ({len(arrays)},)i8, f8, f8, f8, f8, f8, i8, S32"
        columns: Any = np.array(found, kinds)
        return SealSums(skipped, *(columns[name] for name in columns.dtype.names))

    def _read_seals(self) -> Iterator[tuple[int, ShardSeal]]:
        """Yield the seal of every Zarr shard."""
        yield from self.read_seals(self.sealed_shards)

    def read_seals(self, shards: Sequence[int]) -> Iterator[tuple[int, ShardSeal]]:
        """Yield the seals of some Zarr shards; many are requested together from an object store.

        Raises:
            CorruptCacheError: a seal is missing or damaged.
        """
        at_once = _SEALS_AT_ONCE if self.storage.local_dir is None else 1
        for start in range(0, len(shards), at_once):
            some = shards[start : start + at_once]
            names = [layout.seal_name(self.teacher, shard) for shard in some]
            content = self.storage.read_many(names, MAX_JSON_BYTES)
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
        spans, keys = catalog.zarr_shards(self.layout.rows_per_shard)
        is_other = keys[sums.shards_S] != sums.keys_S
        is_other |= (spans[sums.shards_S] != sums.rows_S2).any(1)
        if others := sums.shards_S[is_other].tolist():
            raise CacheError(self.other_images(others))
        is_other = sums.calibration_S != self.calibration.hash.encode()
        if others := sums.shards_S[is_other].tolist():
            raise CacheError(self.other_calibration(others))

    def other_images(self, shards: Sequence[int]) -> str:
        """Return the sentence about Zarr shards that were sealed for other images."""
        return (
            f"{self.storage.url}/{layout.group_name(self.teacher)}: the Zarr shards "
            f"{_first_ones(shards)} were sealed for other images than {layout.INDEX} lists; one of "
            "the two comes from another cache. Restore it, or --overwrite the teacher."
        )

    def other_calibration(self, shards: Sequence[int]) -> str:
        """Return the sentence about Zarr shards that another calibration encoded."""
        return (
            f"{self.storage.url}/{layout.group_name(self.teacher)}: the Zarr shards "
            f"{_first_ones(shards)} were sealed under another calibration than this teacher's, so "
            "they decode to wrong features. Restore it, or delete their seals and build again."
        )

    def _require_statistics(self) -> None:
        """Raise CorruptCacheError unless the arrays without rows are those of the calibration."""
        arrays = self.group_arrays
        sealed = self.calibration.channel_stats_xxh3_128
        if checksum(array.tobytes() for array in arrays.values()) != sealed:
            reason = "differ from the sealed calibration"
        elif not all(np.isfinite(array).all() for array in arrays.values()):
            reason = "are not finite"
        elif not (arrays["channel_std"].astype(np.float32) > 0).all():
            reason = "have a deviation that is not above 0"
        else:
            return
        raise CorruptCacheError(
            f"{self.storage.url}/{layout.group_name(self.teacher)}: {', '.join(arrays)} {reason}. "
            "Restore them from a copy, or --overwrite the teacher."
        )


def _first_ones(shards: Sequence[int]) -> str:
    return f"{', '.join(map(str, shards[:5]))}{'...' if len(shards) > 5 else ''}"


class _Group:
    """The small files of a teacher's group, each one checked against its seal.

    Attributes:
        spec: the spec in the attributes.
    """

    def __init__(self, storage: Storage, teacher: str) -> None:
        self._storage, self._group = storage, layout.group_name(teacher)
        self._sealed = read_record(storage, layout.metadata_name(teacher), GroupRecord).files
        where = f"{storage.url}/{self._group}"
        raw = self._read(["zarr.json"])["zarr.json"]
        attributes = _group_metadata(raw, f"{where}/zarr.json").attributes.movekd
        if attributes.format_version != layout.FORMAT_VERSION:
            raise CacheError(
                f"{where} is of format {shorten(attributes.format_version)}; this movekd reads "
                f"format {layout.FORMAT_VERSION}."
            )
        try:
            spec = validate(CacheSpec, attributes.spec, f"attributes of {teacher}.zarr")
        except ConfigError as error:
            raise ConfigError(
                f"{shorten(error, 1000)}; expected the spec of a teacher. Use the version of "
                "movekd that built it, or rebuild this teacher."
            ) from None
        self.spec: CacheSpec = spec

    def arrays(self, codec: str, width: int) -> dict[str, npt.NDArray[np.generic]]:
        """Return the arrays without rows; each is one chunk, uncompressed.

        Raises:
            CorruptCacheError: a file is not what its seal says, or has another size.
        """
        expected = layout.group_arrays(codec, width)
        files = {name: layout.group_array_file(name, a.ndim) for name, a in expected.items()}
        read = self._read([*(f"{name}/zarr.json" for name in expected), *files.values()])
        found = {}
        for name, array in expected.items():
            if len(read[files[name]]) != array.nbytes:
                raise CorruptCacheError(
                    f"{self._storage.url}/{self._group}: {name} has {len(read[files[name]])} "
                    f"bytes; expected {array.nbytes}. Rebuild this teacher."
                )
            values = np.frombuffer(read[files[name]], array.dtype)
            found[name] = values.reshape(array.shape).copy()
        return found

    def _read(self, files: Sequence[str]) -> dict[str, bytes]:
        """Read files of the group together. The names in the seal are not trusted."""
        raw = self._storage.read_many([f"{self._group}/{file}" for file in files], MAX_JSON_BYTES)
        found = {name.partition("/")[2]: content for name, content in raw.items()}
        for file in files:
            if file not in found or entry([found[file]]) != self._sealed.get(file):
                raise CorruptCacheError(
                    f"{self._storage.url}/{self._group}/{file} is not what its seal says; run "
                    "`movekd cache verify`, and rebuild this teacher."
                )
        return found


def _group_metadata(raw: bytes, source: str) -> GroupMetadata:
    remedy = "Run `movekd cache verify`, and rebuild this teacher."
    content = parse_json(raw, source, error=CorruptCacheError, remedy=remedy)
    try:
        return validate(GroupMetadata, content, source)
    except ConfigError as error:
        raise CorruptCacheError(f"{shorten(error, 1000)}; no teacher's group. {remedy}") from None
