"""Pipeline 1, from shards to a sealed cache: the local engine.

Comes in: a corpus and the specs of some teachers. Goes out: one Zarr group a teacher. The unit of
work is one Zarr shard (one row range); a unit without a seal does not exist, so a rerun does what
is missing and nothing else. An image is decoded once for all teachers, which take turns on the
device; ``build.pipeline`` is what happens in a turn.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from movekd.build.calibrate import (
    begin_with,
    calibrate,
    calibration_of,
    delete_teacher,
    sealed_calibration,
    settled,
)
from movekd.build.lock import build_lock
from movekd.build.options import BuildOptions, Progress
from movekd.build.pipeline import TeacherBuild
from movekd.build.turns import take_turns
from movekd.cache import layout
from movekd.cache.catalog import Catalog, update_catalog
from movekd.cache.check import TeacherStatus, teacher_status
from movekd.cache.codec import ChannelStats
from movekd.cache.reader import TeacherCache
from movekd.cache.records import Calibration
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
from movekd.teachers import Teacher, load_teacher


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
    """Build what is missing of some teachers over the same decoded images; yield a summary each.

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
    with contextlib.ExitStack() as locks:
        for spec in specs:
            locks.enter_context(build_lock(storage, f"{layout.seals_name(spec.name)}/.lock"))
        imported: dict[str, tuple[Calibration, ChannelStats]] = {}
        if channel_stats is not None:  # read before anything is deleted
            source = open_storage(channel_stats)
            imported = {spec.name: calibration_of(source, spec, geometry) for spec in specs}
        loaded: dict[str, Teacher] = {}
        if replace:
            for spec in specs:
                given = imported.get(spec.name)
                dtype = options.dtype if given is None else settled(options, given[0]).dtype
                loaded[spec.name] = load_teacher(spec, "cpu", dtype)
            for spec in specs:  # all of them can be built anew
                _delete(storage, spec, deletes)
        builds: list[TeacherBuild] = []
        calibration_seconds = []
        for spec in specs:
            started = time.perf_counter()
            teacher, run = _begin(
                storage,
                corpus,
                catalog,
                spec,
                options,
                loaded.get(spec.name),
                imported.get(spec.name),
                progress,
            )
            calibration_seconds.append(time.perf_counter() - started)
            store = TeacherCache(storage, spec.name, catalog.num_rows)
            store.require_images(catalog)
            if store.missing_shards:
                teacher = _same_teacher(spec, teacher, store, run)
                builds.append(TeacherBuild(store, catalog, teacher, spec, run))
                if len(specs) > 1 and not options.concurrent:
                    builds[-1].move_to("cpu")
            else:
                builds.append(TeacherBuild(store, catalog, None, spec, run))
        take_turns(builds, corpus, catalog, options, progress)
        for build, seconds in zip(builds, calibration_seconds, strict=True):
            yield _summary(build, catalog, seconds)


def _delete(
    storage: Storage, spec: CacheSpec, deletes: Callable[[str, Mapping[str, int]], None]
) -> None:
    """Delete what the cache holds of a teacher, after saying so."""
    for name in (layout.group_name(spec.name), layout.seals_name(spec.name)):
        deletes(f"{storage.url}/{name}", storage.sizes(name))
    delete_teacher(storage, spec.name)


def _begin(
    storage: Storage,
    corpus: Corpus,
    catalog: Catalog,
    spec: CacheSpec,
    options: BuildOptions,
    teacher: Teacher | None,
    imported: tuple[Calibration, ChannelStats] | None,
    progress: Progress,
) -> tuple[Teacher | None, BuildOptions]:
    """Make sure that a teacher has a sealed calibration and arrays of the right length.

    Returns:
        The teacher where it had to be loaded, and the options that its calibration settles.
    """
    for folder in (layout.group_name(spec.name), layout.seals_name(spec.name)):
        storage.delete_leftovers(folder)
    if imported is not None:
        begin_with(storage, catalog, spec, *imported)
        options = settled(options, imported[0])
    calibration = sealed_calibration(storage, spec)
    if calibration is None:
        if teacher is None:
            teacher = load_teacher(spec, options.device, options.dtype)
        teacher = teacher.to(options.device)
        calibration = calibrate(storage, corpus, catalog, spec, teacher, options, progress)
    resize_group(storage, spec, calibration, catalog.num_rows)
    return teacher, settled(options, calibration)


def _same_teacher(
    spec: CacheSpec, teacher: Teacher | None, store: TeacherCache, options: BuildOptions
) -> Teacher:
    """Return the teacher, loaded unless it is, if it is the one that the cache was begun with.

    Raises:
        CacheError: its weights are others.
    """
    if teacher is None:
        teacher = load_teacher(spec, options.device, options.dtype)
    teacher = teacher.to(device=options.device)
    begun = store.calibration.weights_sha256
    if teacher.weights_sha256 != begun:
        raise CacheError(
            f"the weights of '{spec.name}' have SHA-256 {teacher.weights_sha256[:16]}..., the "
            f"cache was begun with {begun[:16]}...; bring those weights back, or build anew with "
            "--replace."
        )
    if options.compile:
        teacher.compile_forward()
    return teacher


def _summary(build: TeacherBuild, catalog: Catalog, calibration_seconds: float) -> BuildSummary:
    storage, name = build.store.storage, build.spec.name
    store = TeacherCache(storage, name, catalog.num_rows)
    skipped = _skipped_table(catalog, store.skipped)
    write_skipped(storage, name, skipped)
    return BuildSummary(
        status=teacher_status(store, catalog),
        images_built=build.num_done,
        skipped=dict(zip(*(skipped[name].to_pylist() for name in ("key", "reason")), strict=True)),
        seconds=build.seconds,
        calibration_seconds=calibration_seconds,
    )


def _skipped_table(catalog: Catalog, skipped: Mapping[int, str]) -> pa.Table:
    """Return row, key and reason of the images without features, in row order."""
    rows = np.array(sorted(skipped), np.int64)
    keys = catalog.index.take("key", np.searchsorted(catalog.rows, rows))
    reasons = pa.array([skipped[row] for row in rows.tolist()], pa.string())
    return pa.table({"row": pa.array(rows), "key": keys, "reason": reasons})
