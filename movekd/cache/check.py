"""Is every byte of a cache what was written? And is everything there that should be?

Zarr's own CRC covers a shard's index alone: a flipped data byte reads back silently wrong. The
seals hold the checksums that find it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from movekd.cache import layout
from movekd.cache.layout import CACHE_JSON
from movekd.cache.reader import FeatureCache, TeacherCache, open_cache
from movekd.cache.seal import file_entry, read_sealed
from movekd.cache.writer import METADATA, stats_checksum
from movekd.errors import CacheError, MovekdError


@dataclass(frozen=True)
class TeacherStatus:
    """What `movekd cache ls` shows of one teacher."""

    teacher: str
    images: int
    sealed_shards: int
    total_shards: int
    skipped: int
    grid: int
    width: int
    codec: str
    size_bytes: int
    error_mean: float | None
    error_max: float | None
    fingerprint: str
    random_weights: bool


def status(cache: FeatureCache) -> list[TeacherStatus]:
    """Return the state of each teacher of a cache."""
    return [teacher_status(cache[name], len(cache.keys)) for name in cache.teachers]


def teacher_status(teacher: TeacherCache, num_images: int) -> TeacherStatus:
    """Return the state of one teacher of a cache of ``num_images``."""
    seals = list(teacher.seals.values())
    tokens = [seal["error"]["num_tokens"] for seal in seals]
    errors = [seal["error"]["mean"] * seal["error"]["num_tokens"] for seal in seals]
    sizes = [entry["size_bytes"] for seal in seals for entry in seal["files"].values()]
    return TeacherStatus(
        teacher=teacher.teacher,
        images=num_images,
        sealed_shards=len(seals),
        total_shards=len(seals) + len(teacher.missing_shards),
        skipped=len(teacher.skipped),
        grid=teacher.grid,
        width=teacher.width,
        codec=teacher.spec.codec,
        size_bytes=sum(sizes),
        error_mean=sum(errors) / sum(tokens) if sum(tokens) else None,
        error_max=max(seal["error"]["max"] for seal in seals) if seals else None,
        fingerprint=teacher.spec.fingerprint,
        random_weights=teacher.spec.weights == "random",
    )


def verify(cache_dir: Path, progress: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong: checksums of every byte, and completeness.

    Args:
        cache_dir: the cache.
        progress: called with the bytes of each file when it has been read.
    """
    try:
        cache = open_cache(cache_dir)
        catalog_files = read_sealed(cache_dir / CACHE_JSON)["files"]
    except CacheError as error:
        yield str(error)
        return
    yield from _check_files(
        cache_dir, catalog_files, progress, "Delete this file and run its `movekd cache build`."
    )
    for path in sorted(cache_dir.glob("*.zarr")):
        name = path.name.removesuffix(".zarr")
        if name not in cache.teachers:
            yield f"{path} has no sealed calibration; run its `movekd cache build` again."
            continue
        try:
            yield from _verify_teacher(cache, name, progress)
        except MovekdError as error:
            yield str(error)


def size_bytes(cache_dir: Path) -> int:
    """Return the bytes of all files under a cache: what ``verify`` will read."""
    return sum(path.stat().st_size for path in cache_dir.rglob("*") if path.is_file())


def _verify_teacher(
    cache: FeatureCache, name: str, progress: Callable[[int], None]
) -> Iterator[str]:
    group = layout.group_dir(cache.cache_dir, name)
    metadata = read_sealed(layout.seals_dir(cache.cache_dir, name) / METADATA)["files"]
    yield from _check_files(group, metadata, progress, "Build this teacher anew with --replace.")
    teacher = cache[name]  # after its metadata's checksums: damaged ones may not open
    if stats_checksum(teacher.stats) != teacher.calibration.channel_stats_xxh3_128:
        yield f"{group}: channel_mean or channel_std differ from the sealed calibration."
    known = set(metadata)
    for shard in range(teacher.layout.num_shards(teacher.num_rows)):
        path = layout.seal_path(teacher.cache_dir, teacher.teacher, shard)
        if not path.exists():
            yield f"{group}: Zarr shard {shard} is not built; run `movekd cache build` again."
            continue
        try:
            seal = read_sealed(path)
        except CacheError as error:
            yield str(error)
            continue
        if seal["calibration"] != teacher.calibration.hash:
            yield f"{path} was sealed under another calibration; rebuild this Zarr shard."
        known.update(seal["files"])
        yield from _check_files(group, seal["files"], progress)
    for path in sorted(group.rglob("*")):
        if path.is_file() and str(path.relative_to(group)) not in known:
            yield f"{path} is covered by no seal; a build was interrupted, or the file is foreign."


def _check_files(
    folder: Path,
    files: dict[str, dict[str, Any]],
    progress: Callable[[int], None],
    remedy: str = "Delete its seal and build again.",
) -> Iterator[str]:
    """Yield a sentence for each file that is missing or not what its entry says."""
    for name, expected in files.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            yield f"a seal names the file {name!r}, outside of {folder}; it was tampered with."
            continue
        if not path.is_file():
            yield f"{path} is missing."
            continue
        found = file_entry(path)
        progress(found["size_bytes"])
        if found != expected:
            yield (
                f"{path} is damaged: {found['size_bytes']} bytes with checksum "
                f"{found['xxh3_128']}; its seal says {expected['size_bytes']} bytes with "
                f"{expected['xxh3_128']}. {remedy}"
            )
