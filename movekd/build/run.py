"""Pipeline 1, from shards to a sealed cache: the local engine.

Comes in: a corpus and the specs of some teachers. Goes out: one Zarr group a teacher. The unit of
work is one Zarr shard (one row range); a unit without a seal does not exist, so a rerun does what
is missing and nothing else.

    corpus -> decode (worker processes) -> teacher (device) -> grid, codec (device) -> one Zarr
    shard in memory -> writer (thread) -> seal

Legend: B batch, C H W image, N tokens, D channels.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.build.images import PixelBatch, image_transform, pixel_batches
from movekd.build.lock import build_lock
from movekd.build.shard import ShardInMemory, Unit
from movekd.cache import codec, grid, layout
from movekd.cache.catalog import Catalog, update_catalog
from movekd.cache.check import TeacherStatus, teacher_status
from movekd.cache.reader import TeacherCache
from movekd.cache.spec import CacheSpec
from movekd.cache.writer import (
    Calibration,
    create_group,
    read_calibration,
    resize_group,
    stats_checksum,
)
from movekd.corpus.images import Geometry
from movekd.corpus.index import Corpus
from movekd.errors import CacheError
from movekd.teachers import Teacher, TeacherOutput, load_teacher

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many images are done, and how many there are."""


@dataclass(frozen=True)
class BuildOptions:
    """Where and how a build runs; nothing here changes which features are asked for."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 32
    num_workers: int = 1


@dataclass(frozen=True)
class BuildSummary:
    """What a build of one teacher did."""

    status: TeacherStatus
    images_built: int
    skipped: Mapping[str, str]
    seconds: float
    calibration_seconds: float


def build_cache(
    cache_dir: Path,
    corpus: Corpus,
    specs: Sequence[CacheSpec],
    *,
    geometry: Geometry,
    options: BuildOptions,
    replace: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[BuildSummary]:
    """Build what is missing of some teachers, one after the other; yield a summary each.

    Interrupted at any instant and run again, it ends byte-identical to an undisturbed build
    (for equal device, dtype, thread count and library versions).

    Raises:
        CacheError: the cache is of another geometry, corpus, spec or weights (names which);
            or another build of the teacher is running.
    """
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image; nothing to build.")
    with build_lock(cache_dir / ".lock", wait=True):  # builds of other teachers do the same
        _delete_leftovers(cache_dir.glob(".*.tmp"))
        catalog = update_catalog(cache_dir, corpus, geometry)
    for spec in specs:
        seals = layout.seals_dir(cache_dir, spec.name)
        with build_lock(seals / ".lock"):
            if replace:
                delete_teacher(cache_dir, spec.name)
            _delete_leftovers(seals.glob(".*.tmp"))
            _delete_leftovers(layout.group_dir(cache_dir, spec.name).rglob("*.partial"))  # zarr's
            yield _build_teacher(cache_dir, corpus, catalog, spec, options, progress)


def delete_teacher(cache_dir: Path, teacher: str) -> None:
    """Delete a teacher's features and seals, the seals first: nothing half-valid remains."""
    seals = layout.seals_dir(cache_dir, teacher)
    for seal in seals.glob("*.json"):
        seal.unlink()
    shutil.rmtree(layout.group_dir(cache_dir, teacher), ignore_errors=True)


def _delete_leftovers(paths: Iterable[Path]) -> None:
    """Delete temporary files of a build that was killed."""
    for path in list(paths):
        path.unlink(missing_ok=True)


def _build_teacher(
    cache_dir: Path,
    corpus: Corpus,
    catalog: Catalog,
    spec: CacheSpec,
    options: BuildOptions,
    progress: Progress,
) -> BuildSummary:
    started = time.perf_counter()
    calibration = _sealed_calibration(cache_dir, spec)
    teacher: Teacher | None = None
    if calibration is None:
        teacher = load_teacher(spec, options.device, options.dtype)
        calibration = _calibrate(cache_dir, corpus, catalog, spec, teacher, options, progress)
    calibration_seconds = time.perf_counter() - started
    resize_group(cache_dir, spec.name, catalog.num_rows)

    started = time.perf_counter()
    store = TeacherCache(cache_dir, spec.name, catalog.num_rows)
    units = _units(catalog, calibration.layout(spec), store.missing_shards)
    if units:
        if teacher is None:
            teacher = load_teacher(spec, options.device, options.dtype)
        if teacher.weights_sha256 != calibration.weights_sha256:
            raise CacheError(
                f"the weights of '{spec.name}' have SHA-256 {teacher.weights_sha256[:16]}..., the "
                f"cache was begun with {calibration.weights_sha256[:16]}...; bring those weights "
                "back, or build anew with --replace."
            )
        _build_units(cache_dir, corpus, catalog, spec, store, teacher, units, options, progress)
    store = TeacherCache(cache_dir, spec.name, catalog.num_rows)
    keys = catalog.index["key"]
    return BuildSummary(
        status=teacher_status(store, catalog.num_images),
        images_built=sum(len(unit.images) for unit in units),
        skipped={
            keys[int(np.searchsorted(catalog.rows, row))].as_py(): reason
            for row, reason in store.skipped.items()
        },
        seconds=time.perf_counter() - started,
        calibration_seconds=calibration_seconds,
    )


def _sealed_calibration(cache_dir: Path, spec: CacheSpec) -> Calibration | None:
    """Return the calibration of an earlier build of the same spec, or None for a new teacher."""
    calibration = read_calibration(cache_dir, spec.name)
    if calibration is None or calibration.spec_fingerprint == spec.fingerprint:
        return calibration
    stored = TeacherCache(cache_dir, spec.name, 0).spec.model_dump()
    asked = spec.model_dump()
    differs = [
        f"{key} is {stored[key]!r} in the cache, {asked[key]!r} asked for"
        for key in asked
        if stored[key] != asked[key] and key not in ("description", "weights")
    ]
    if (stored["weights"] == "random") != (asked["weights"] == "random"):
        differs.append(f"weights are {stored['weights']!r} in the cache")
    raise CacheError(
        f"teacher '{spec.name}' in {cache_dir} was built from another spec: "
        f"{'; '.join(differs)}. Give the old value, use another --cache, or --replace it."
    )


def _calibrate(
    cache_dir: Path,
    corpus: Corpus,
    catalog: Catalog,
    spec: CacheSpec,
    teacher: Teacher,
    options: BuildOptions,
    progress: Progress,
) -> Calibration:
    """Fix channel statistics and batch size once, and make the group.

    The images are those with the smallest keys: a key is the SHA-256 of the image, so that is a
    uniform draw which does not depend on the corpus' (biased) order.
    """
    delete_teacher(cache_dir, spec.name)
    num_images = min(spec.calibration_images, len(corpus))
    keys = np.asarray(corpus.index["key"].to_numpy(zero_copy_only=False), dtype="S")
    chosen = np.sort(np.argsort(keys, kind="stable")[:num_images])
    batches = _chunks(chosen, options.batch_size)
    statistics = codec.StatsAccumulator()
    output: TeacherOutput | None = None
    done = 0
    for batch in _batches(corpus, catalog, spec, batches, options):
        if len(batch.unreadable) < len(batch.images):
            output = _on_grid(teacher.forward(_to_device(batch, options)), spec)
            readable = [i for i in range(len(batch.images)) if i not in batch.unreadable]
            statistics.add(output.tokens_BND[readable].float())
        done += len(batch.images)
        progress(f"{spec.name}: calibrate", done, num_images)
    stats = statistics.result()
    assert output is not None  # result() raises when nothing was added
    calibration = Calibration(
        spec_fingerprint=spec.fingerprint,
        weights_sha256=teacher.weights_sha256,
        batch_size=options.batch_size,
        num_images=num_images,
        num_tokens=output.tokens_BND.shape[1],
        width=output.tokens_BND.shape[2],
        cls_width=None if output.cls_BD is None else output.cls_BD.shape[1],
        num_heads=None if output.cls_attention_BHN is None else output.cls_attention_BHN.shape[1],
        channel_stats_xxh3_128=stats_checksum(stats),
    )
    create_group(cache_dir, spec, calibration, stats, catalog.num_rows)
    return calibration


def _units(catalog: Catalog, teacher: layout.TeacherLayout, shards: Sequence[int]) -> list[Unit]:
    """Return the units of the given Zarr shards; a shard wholly in a gap has no rows."""
    rows = catalog.rows
    units = []
    for shard in shards:
        first = shard * teacher.rows_per_shard
        low, high = np.searchsorted(rows, [first, first + teacher.rows_per_shard])
        units.append(Unit(shard, rows[low:high], np.arange(low, high)))
    return units


def _build_units(
    cache_dir: Path,
    corpus: Corpus,
    catalog: Catalog,
    spec: CacheSpec,
    store: TeacherCache,
    teacher: Teacher,
    units: Sequence[Unit],
    options: BuildOptions,
    progress: Progress,
) -> None:
    """Run the teacher over the units; encode on the device, write and seal in a thread."""
    stats = store.stats.to(torch.device(options.device))
    per_unit = [_chunks(unit.images, store.calibration.batch_size) for unit in units]
    batches = [batch for chunks in per_unit for batch in chunks]
    stream = _batches(corpus, catalog, spec, batches, options)
    total, done = sum(len(unit.images) for unit in units), 0
    written: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for unit, chunks in zip(units, per_unit, strict=True):
            filling = ShardInMemory(store, unit)
            for _ in chunks:
                batch = next(stream)
                if len(batch.unreadable) < len(batch.images):
                    output = _on_grid(teacher.forward(_to_device(batch, options)), spec)
                    filling.add(output, batch, stats)
                else:
                    filling.skip(batch)
                done += len(batch.images)
                progress(f"{spec.name}: build", done, total)
            if written is not None:
                written.result()  # at most one Zarr shard waits for the disk
            written = writer.submit(filling.write, cache_dir)
        if written is not None:
            written.result()


def _batches(
    corpus: Corpus,
    catalog: Catalog,
    spec: CacheSpec,
    batches: Sequence[npt.NDArray[np.int64]],
    options: BuildOptions,
) -> Iterator[PixelBatch]:
    return pixel_batches(
        corpus,
        image_transform(spec, catalog.geometry),
        [batch.tolist() for batch in batches],
        num_workers=options.num_workers,
        pin_memory=options.device.startswith("cuda"),
    )


def _to_device(batch: PixelBatch, options: BuildOptions) -> Tensor:
    return batch.pixels_BCHW.to(options.device, options.dtype, non_blocking=True)


def _on_grid(output: TeacherOutput, spec: CacheSpec) -> TeacherOutput:
    """Return the output resized to the grid that the spec stores."""
    if spec.grid == "native":
        return output
    attention = output.cls_attention_BHN
    return TeacherOutput(
        grid.resize_tokens(output.tokens_BND.float(), spec.grid),
        output.cls_BD,
        None if attention is None else grid.resize_attention(attention.float(), spec.grid),
    )


def _chunks(values: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
