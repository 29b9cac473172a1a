"""Check that every byte of a cache is what was written, and that nothing is missing.

Input: a cache. Output: its state (`cache ls`), or one sentence per problem (`cache verify`).

Zarr's CRC covers only the index of a shard, so a flipped data byte reads back silently wrong. The
checksums in the seals find it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from movekd.cache import layout
from movekd.cache.catalog import Catalog
from movekd.cache.contents import CacheContents, TeacherContents, open_contents
from movekd.cache.schema import CacheRecord, GroupRecord, ShardSeal, SkippedSeal
from movekd.cache.seal import entry, read_record
from movekd.cache.storage import Storage, open_storage
from movekd.errors import CacheError, CorruptCacheError, MovekdError
from movekd.files.ownership import FileEntry

_MEND = "Run its `movekd cache build` with --verify, which builds this Zarr shard again."
_LOCK = re.compile(r"\.(.+\.)?lock(\.\d+)?")
"""What ``extract.locks`` makes; in an object store the names end in a number."""
_SEAL = re.compile(r"\d+\.json")


@dataclass(frozen=True)
class TeacherStatus:
    """What `movekd cache ls` shows of one teacher."""

    teacher: str
    images: int
    rows: int
    """Views of the images."""
    sealed_shards: int
    total_shards: int
    skipped: int
    grid: int
    width: int
    codec: str
    compressor: str
    size_bytes: int
    error_mean: float | None
    error_max: float | None
    error_limited_mean: float | None
    """Error with values limited to 8 sigma; None if an earlier movekd sealed a Zarr shard."""
    error_limited_max: float | None
    error_energy: float | None
    """Squared error over squared norm, weighted by tokens; None as above."""
    std_floor: float
    """Smallest deviation of a channel, as a share of the median; 0: no floor."""
    fingerprint: str
    random_weights: bool
    recoded_from: tuple[str, ...]
    """Codecs that held the tokens before a recoding; the errors are then upper bounds."""


def status(cache: CacheContents) -> list[TeacherStatus]:
    """Return the state of each teacher of a cache."""
    teachers = [cache.sealed(name) for name in cache.teachers]
    for teacher in teachers:
        teacher.require_images(cache.catalog)
    return [teacher_status(teacher, cache.catalog) for teacher in teachers]


def teacher_status(teacher: TeacherContents, catalog: Catalog) -> TeacherStatus:
    """Return the state of one teacher of a cache."""
    sums = teacher.sums
    num_sealed, num_tokens = len(sums.shards_S), int(sums.num_tokens_S.sum())
    errors = float((sums.error_mean_S * sums.num_tokens_S).sum())
    limited = float((sums.limited_mean_S * sums.num_tokens_S).sum())  # NaN if one is unknown
    energy = float((sums.energy_S * sums.num_tokens_S).sum())
    has_limited = num_tokens > 0 and not math.isnan(limited)
    return TeacherStatus(
        teacher=teacher.teacher,
        images=catalog.num_images,
        rows=len(catalog.index),
        sealed_shards=num_sealed,
        total_shards=num_sealed + len(teacher.missing_shards),
        skipped=len(sums.skipped),
        grid=teacher.grid,
        width=teacher.width,
        codec=teacher.codec_name,
        compressor=teacher.spec.compressor,
        size_bytes=int(sums.size_bytes_S.sum()),
        error_mean=errors / num_tokens if num_tokens else None,
        error_max=float(sums.error_max_S.max()) if num_sealed else None,
        error_limited_mean=limited / num_tokens if has_limited else None,
        error_limited_max=float(sums.limited_max_S.max()) if has_limited else None,
        error_energy=energy / num_tokens if num_tokens and not math.isnan(energy) else None,
        std_floor=teacher.spec.std_floor or 0.0,
        fingerprint=teacher.spec.fingerprint,
        random_weights=teacher.spec.weights == "random",
        recoded_from=tuple(source.codec for source in teacher.spec.recoded_from),
    )


def verify(
    url: str | Path | Storage, progress: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Yield one sentence per problem, after checking every byte and every seal.

    Args:
        url: the cache.
        progress: called with the number of bytes of each file after it was read.

    Raises:
        CacheError: the place holds no cache, or another format version, or does not answer.
    """
    storage = open_storage(url)
    try:
        cache = open_contents(storage)
        catalog_files = read_record(storage, layout.CACHE_JSON, CacheRecord).files
    except CorruptCacheError as error:
        yield str(error)
        return
    yield from _check_files(storage, "", catalog_files, progress)
    folders = storage.folders()
    groups = {folder.removesuffix(".zarr") for folder in folders if folder.endswith(".zarr")}
    for name in sorted({*groups, *cache.teachers}):  # seals remain if a group is gone
        if name not in cache.teachers:
            yield (
                f"{storage.url}/{layout.group_name(name)} has no sealed calibration; run its "
                "`movekd cache build` again."
            )
            continue
        try:
            yield from _verify_teacher(cache, name, progress)
        except MovekdError as error:
            yield str(error)
    for path in storage.files(""):
        if path.startswith(".") and path.endswith(".tmp"):
            yield (
                f"{storage.url}/{path} was left by a write that did not end; if no build is "
                "running, the next `movekd cache build` of its teacher deletes it."
            )


def _verify_teacher(
    cache: CacheContents, name: str, progress: Callable[[int], None]
) -> Iterator[str]:
    storage, group = cache.storage, layout.group_name(name)
    sealed = read_record(storage, layout.metadata_name(name), GroupRecord)
    metadata = sealed.files
    yield from _check_files(
        storage,
        group,
        metadata,
        progress,
        "Run its `movekd cache build` again, which mends an array's metadata; else --overwrite it.",
    )
    teacher = cache.sealed(name)  # after the checksums: damaged metadata may not open
    expected = set(teacher.metadata_files)
    if set(metadata) != expected or sealed.num_rows != teacher.num_rows:
        yield (
            f"{storage.url}/{layout.metadata_name(name)} covers {len(metadata)} files and "
            f"{sealed.num_rows} rows, the cache has {len(expected)} and {teacher.num_rows}; run "
            "its `movekd cache build` again."
        )
    missing = set(teacher.missing_shards)
    for shard in sorted(missing):
        yield (
            f"{storage.url}/{group}: Zarr shard {shard} is not built; run `movekd cache "
            f"{_maker(teacher)}` again."
        )
    shards = [s for s in range(teacher.layout.num_shards(teacher.num_rows)) if s not in missing]
    for _, problem in shard_problems(teacher, cache.catalog, shards, progress):
        yield problem
    skipped = read_record(storage, layout.skipped_seal_name(name), SkippedSeal).files
    yield from _check_files(
        storage, layout.seals_name(name), skipped, progress, "Run its `movekd cache build` again."
    )
    own = {*metadata}
    for array in teacher.layout.arrays.values():
        own.update(layout.shard_file(array, shard) for shard in shards)
    for path in storage.sizes(group):
        if path.removeprefix(f"{group}/") not in own:
            yield (
                f"{storage.url}/{path} is covered by no seal; a build was interrupted, or the file "
                "is foreign."
            )
    yield from _foreign_seals(teacher)


def shard_problems(
    teacher: TeacherContents,
    catalog: Catalog,
    shards: Sequence[int],
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, str]]:
    """Yield each problem of some sealed Zarr shards: the shard, and a sentence.

    Args:
        teacher: the teacher.
        catalog: the images of its cache.
        shards: numbers of Zarr shards with a seal, ascending.
        progress: called with the number of bytes of each file after it was read.
    """
    storage, group = teacher.storage, layout.group_name(teacher.teacher)
    mend = _MEND.replace("build`", f"{_maker(teacher)}`")
    size, rows_of_images = teacher.layout.rows_per_shard, catalog.rows
    keys = catalog.keys_checksums((shard * size, (shard + 1) * size) for shard in shards)
    for shard, expected_keys in zip(shards, keys, strict=True):
        seal_name = layout.seal_name(teacher.teacher, shard)
        try:
            seal = read_record(storage, seal_name, ShardSeal)
        except CacheError as error:
            yield shard, str(error)
            continue
        if seal.calibration != teacher.calibration.hash:
            yield (
                shard,
                f"{storage.url}/{seal_name} was sealed under another calibration. {mend}",
            )
        first = shard * size
        low, high = np.searchsorted(rows_of_images, [first, first + size])
        rows = [first, int(rows_of_images[high - 1]) + 1 if high > low else first]
        files = {layout.shard_file(array, shard) for array in teacher.layout.arrays.values()}
        if seal.rows != rows or set(seal.files) != files:
            yield (
                shard,
                f"{storage.url}/{seal_name} covers rows {seal.rows} and {len(seal.files)} "
                f"files, its Zarr shard has {rows} and {len(files)}. {mend}",
            )
        if seal.rows == rows and seal.keys_xxh3_128 != expected_keys:
            yield (
                shard,
                f"{storage.url}/{seal_name} was made for other images than {layout.INDEX} lists; "
                "one of the two comes from another cache. Restore it, or --overwrite the teacher.",
            )
        for problem in _check_files(storage, group, seal.files, progress, mend):
            yield shard, problem


def _maker(teacher: TeacherContents) -> str:
    """Return the command of `movekd cache` that makes the Zarr shards of a teacher."""
    return "recode" if teacher.spec.recoded_from else "build"


def _foreign_seals(teacher: TeacherContents) -> Iterator[str]:
    """Yield one sentence per file beside the seals that a build does not write there."""
    name, storage = teacher.teacher, teacher.storage
    num_shards = teacher.layout.num_shards(teacher.num_rows)
    own = {
        layout.calibration_name(name),
        layout.metadata_name(name),
        layout.skipped_name(name),
        layout.skipped_seal_name(name),
        *(layout.seal_name(name, shard) for shard in range(num_shards)),
    }
    for path in storage.sizes(layout.seals_name(name)):
        file = PurePosixPath(path).name
        if path in own or _LOCK.fullmatch(file):
            continue
        if _SEAL.fullmatch(file):
            what = f"seals a Zarr shard that the cache does not have; it has {num_shards}"
        else:
            what = "is no seal of this teacher"
        yield f"{storage.url}/{path} {what}. No build wrote it; delete it."


def _check_files(
    storage: Storage,
    folder: str,
    files: Mapping[str, FileEntry],
    progress: Callable[[int], None],
    remedy: str = _MEND,
) -> Iterator[str]:
    for name, expected in files.items():
        path = f"{storage.url}/{folder}/{name}" if folder else f"{storage.url}/{name}"
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            yield (
                f"a seal names the file {name!r}, outside of {storage.url}/{folder}; it was "
                "tampered with."
            )
            continue
        try:
            found = entry(storage.blocks(f"{folder}/{name}".lstrip("/")))
        except FileNotFoundError:
            yield f"{path} is missing. {remedy}"
            continue
        except CacheError as error:
            yield str(error)
            continue
        progress(found.size_bytes)
        if found != expected:
            yield (
                f"{path} is damaged: {found.size_bytes} bytes with checksum "
                f"{found.xxh3_128}; its seal says {expected.size_bytes} bytes with "
                f"{expected.xxh3_128}. {remedy}"
            )
