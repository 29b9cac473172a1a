"""Pipeline 1, from shards to a sealed cache: the local engine.

Comes in: a corpus and the specs of some teachers. Goes out: one Zarr group a teacher. The unit of
work is one Zarr shard (one row range); a unit without a seal does not exist, so a rerun does what
is missing and nothing else.

    corpus -> decode (worker processes) -> teacher (device) -> grid, codec (device) -> one Zarr
    shard in memory -> writer (thread) -> seal

Legend: B batch, C H W image, N tokens, D channels.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from movekd.build.calibrate import (
    begin_with,
    calibrate,
    calibration_of,
    delete_teacher,
    sealed_calibration,
)
from movekd.build.images import PixelBatch, image_transform, pixel_batches
from movekd.build.lock import build_lock
from movekd.build.options import BuildOptions, Progress
from movekd.build.shard import ShardInMemory, Unit
from movekd.cache import grid, layout
from movekd.cache.catalog import Catalog, update_catalog
from movekd.cache.check import TeacherStatus, teacher_status
from movekd.cache.reader import TeacherCache
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import Storage, open_storage
from movekd.cache.writer import (
    resize_group,
    write_skipped,
)
from movekd.corpus.anyres import Views
from movekd.corpus.images import Geometry
from movekd.corpus.index import Corpus
from movekd.errors import CacheError
from movekd.teachers import Teacher, TeacherOutput, load_teacher


@dataclass(frozen=True)
class BuildSummary:
    """What a build of one teacher did."""

    status: TeacherStatus
    images_built: int
    """Rows, which are views of images."""
    skipped: Mapping[str, str]
    seconds: float
    calibration_seconds: float


def build_cache(
    url: str | Path | Storage,
    corpus: Corpus,
    specs: Sequence[CacheSpec],
    *,
    geometry: Geometry,
    views: Views = "base",
    options: BuildOptions,
    replace: bool = False,
    channel_stats: str | Path | Storage | None = None,
    deletes: Callable[[str, Mapping[str, int]], None] = lambda folder, sizes: None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[BuildSummary]:
    """Build what is missing of some teachers, one after the other; yield a summary each.

    Interrupted at any instant and run again, it ends byte-identical to an undisturbed build
    (for equal device, dtype, thread count and library versions).

    Args:
        url: the cache: a folder, or ``s3://bucket/prefix``.
        corpus: the images.
        specs: the teachers.
        geometry: how every image becomes a square; one a cache.
        views: whether to build the tiles of every image as well; one answer a cache.
        options: where and how to run.
        replace: delete what the cache holds of these teachers first.
        channel_stats: another cache whose sealed calibration a new teacher takes over, so that
            parts built on several machines are encoded alike; None calibrates on the corpus.
        deletes: told what ``replace`` is about to delete, a folder and the sizes of its files,
            when everything that can be checked has been.
        progress: told what is being done.

    Raises:
        CacheError: the cache is of other views, another geometry, corpus, spec or weights (names
            which); or another build of the teacher is running.
    """
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image; nothing to build.")
    storage = open_storage(url)
    with build_lock(storage, ".lock", wait=True):  # builds of other teachers do the same
        for name in (layout.CACHE_JSON, layout.INDEX, layout.NAMES):
            storage.delete_leftovers(name)
        catalog = update_catalog(storage, corpus, geometry, views)
    for spec in specs:
        with build_lock(storage, f"{layout.seals_name(spec.name)}/.lock"):
            imported = None  # read before anything is deleted
            if channel_stats is not None:
                imported = calibration_of(open_storage(channel_stats), spec, geometry)
            run = options
            if imported is not None:
                run = dataclasses.replace(options, dtype=getattr(torch, imported[0].dtype))
            teacher = None
            if replace:
                teacher = load_teacher(spec, run.device, run.dtype)  # or nothing is deleted
                for name in (layout.group_name(spec.name), layout.seals_name(spec.name)):
                    deletes(f"{storage.url}/{name}", storage.sizes(name))
                delete_teacher(storage, spec.name)
            for folder in (layout.group_name(spec.name), layout.seals_name(spec.name)):
                storage.delete_leftovers(folder)
            if imported is not None:
                begin_with(storage, catalog, spec, *imported)
            yield _build_teacher(storage, corpus, catalog, spec, teacher, run, progress)


def _build_teacher(
    storage: Storage,
    corpus: Corpus,
    catalog: Catalog,
    spec: CacheSpec,
    teacher: Teacher | None,
    options: BuildOptions,
    progress: Progress,
) -> BuildSummary:
    started = time.perf_counter()
    calibration = sealed_calibration(storage, spec)
    if calibration is None:
        teacher = teacher or load_teacher(spec, options.device, options.dtype)
        calibration = calibrate(storage, corpus, catalog, spec, teacher, options, progress)
    options = dataclasses.replace(options, dtype=getattr(torch, calibration.dtype))
    calibration_seconds = time.perf_counter() - started
    resize_group(storage, spec, calibration, catalog.num_rows)

    started = time.perf_counter()
    store = TeacherCache(storage, spec.name, catalog.num_rows)
    store.require_images(catalog)
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
        _build_units(storage, corpus, catalog, spec, store, teacher, units, options, progress)
    store = TeacherCache(storage, spec.name, catalog.num_rows)
    skipped = _skipped_table(catalog, store.skipped)
    write_skipped(storage, spec.name, skipped)
    return BuildSummary(
        status=teacher_status(store, catalog),
        images_built=sum(len(unit.images) for unit in units),
        skipped=dict(zip(*(skipped[name].to_pylist() for name in ("key", "reason")), strict=True)),
        seconds=time.perf_counter() - started,
        calibration_seconds=calibration_seconds,
    )


def _skipped_table(catalog: Catalog, skipped: Mapping[int, str]) -> pa.Table:
    """Return row, key and reason of the images without features, in row order."""
    rows = np.array(sorted(skipped), np.int64)
    keys = catalog.index["key"].take(pa.array(np.searchsorted(catalog.rows, rows)))
    reasons = pa.array([skipped[row] for row in rows.tolist()], pa.string())
    return pa.table({"row": pa.array(rows), "key": keys, "reason": reasons})


def _units(catalog: Catalog, teacher: layout.TeacherLayout, shards: Sequence[int]) -> list[Unit]:
    """Return the units of the given Zarr shards; a shard wholly in a gap has no rows."""
    rows = catalog.rows
    units = []
    for shard in shards:
        first = shard * teacher.rows_per_shard
        low, high = np.searchsorted(rows, [first, first + teacher.rows_per_shard])
        inside = rows[low:high]
        keys = catalog.keys_checksum(first, first + teacher.rows_per_shard)
        units.append(Unit(shard, inside, np.arange(low, high), keys))
    return units


def _build_units(
    storage: Storage,
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
            filling = ShardInMemory(store, unit, spec.max_error)
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
            written = writer.submit(filling.write, storage)
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
        [catalog.images[batch].tolist() for batch in batches],
        views=[catalog.views[batch].tolist() for batch in batches],
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
