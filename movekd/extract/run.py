"""Pipeline 1, from shards to a sealed cache: what is settled, who builds, what came of it.

Comes in: a corpus and the specs of some teachers. Goes out: one Zarr group a teacher. The unit of
work is one Zarr shard (one row range); a unit without a seal does not exist, so a rerun does what
is missing and nothing else. Here is what holds for all units; ``extract.executor`` builds them on
this machine, ``extract.ray.executor`` on many.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from movekd.cache import layout
from movekd.cache.catalog import Catalog, update_catalog
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage, open_storage
from movekd.cache.verify import TeacherStatus, teacher_status
from movekd.cache.writer import TeacherWriter, resize_group
from movekd.corpus.anyres import Views
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import Geometry
from movekd.errors import CacheError, ConfigError
from movekd.extract.calibrate import (
    begin_with,
    calibration_of,
    delete_teacher,
    sealed_calibration,
    settled,
)
from movekd.extract.executor import BuildContext, Executor, JobResult, LocalExecutor, TeacherJob
from movekd.extract.lock import build_lock
from movekd.extract.locks import BuildLocks
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.partition import Partition

Imported = tuple[Calibration, ChannelStats]


@dataclass(frozen=True)
class BuildSummary:
    """What a build of one teacher did.

    Attributes:
        status: what the cache now holds of the teacher.
        images_built: rows of this build; they are views of images.
        skipped: key -> why the image could not be read, of all builds.
        seconds: of this build, without the calibration.
        calibration_seconds: of settling the calibration.
    """

    status: TeacherStatus
    images_built: int
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
    engine: Executor | None = None,
    partition: Partition | None = None,
    replace: bool = False,
    channel_stats: str | Path | Storage | None = None,
    deletes: Callable[[str, Mapping[str, int]], None] = lambda folder, sizes: None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[BuildSummary]:
    """Build what is missing of some teachers over the same decoded images; yield a summary each.

    Interrupted at any instant and run again, it ends byte-identical to an undisturbed build
    (for equal device, dtype, thread count and library versions), whichever engine ran it and in
    however many parts.

    Args:
        url: the cache: a folder, or ``s3://bucket/prefix``.
        corpus: the images.
        specs: the teachers.
        geometry: how every image becomes a square; one a cache.
        views: whether to build the tiles of every image as well; one answer a cache.
        options: where and how to run.
        engine: who runs the teachers; this process unless given.
        partition: which part of the Zarr shards to build; all unless given. The first part to come
            calibrates, the others wait for it.
        replace: delete what the cache holds of these teachers first.
        channel_stats: another cache whose sealed calibration a new teacher takes over, so that
            parts built on several machines are encoded alike; None calibrates on the corpus.
        deletes: told what ``replace`` is about to delete, a folder and the sizes of its files,
            when everything that can be checked has been.
        progress: told what is being done.

    Raises:
        CacheError: the cache is of other views, another geometry, corpus, spec or weights (names
            which); or another build of the teacher is running.
        ConfigError: a part is to replace what all of them build.
    """
    if partition is not None and replace:
        raise ConfigError(
            f"--partition {partition} builds one of {partition.count} parts and --overwrite "
            "deletes them all. Run a whole build with --overwrite, stop it when it has calibrated, "
            "and start the parts without --overwrite; or build into another --cache."
        )
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image; nothing to build.")
    storage, engine = open_storage(url), engine or LocalExecutor()
    with build_lock(storage, ".lock", wait=True):  # builds of other teachers do the same
        for name in (layout.CACHE_JSON, layout.INDEX, layout.NAMES):
            storage.delete_leftovers(name)
        catalog = update_catalog(storage, corpus, geometry, views)
    site = BuildContext(storage, corpus, catalog, options, progress)
    with BuildLocks(storage, [spec.name for spec in specs], partition) as locks:
        with locks.settling():
            engine.begin(site, specs)
            imported: dict[str, Imported] = {}
            if channel_stats is not None:  # read before anything is deleted
                source = open_storage(channel_stats)
                imported = {spec.name: calibration_of(source, spec, geometry) for spec in specs}
            if replace:
                _replace(site, engine, specs, imported, deletes)
            jobs, calibration_seconds = [], []
            for spec in specs:
                _delete_leftovers(storage, locks, spec)
                started = time.perf_counter()
                _begin(site, engine, spec, imported.get(spec.name))
                calibration_seconds.append(time.perf_counter() - started)
                jobs.append(_job(site, spec, partition))
        done = engine.build(site, jobs)
        with locks.settling():
            for spec in specs:  # those of workers that were killed meanwhile
                _delete_leftovers(storage, locks, spec)
                locks.remove_dead(spec.name)
            summaries = [
                _summary(site, *each) for each in zip(specs, done, calibration_seconds, strict=True)
            ]
    yield from summaries


def _replace(
    site: BuildContext,
    engine: Executor,
    specs: Sequence[CacheSpec],
    imported: Mapping[str, Imported],
    deletes: Callable[[str, Mapping[str, int]], None],
) -> None:
    """Delete what the cache holds of some teachers, after saying so; all can be built anew."""
    for spec in specs:
        given = imported.get(spec.name)
        run = site.options if given is None else settled(site.options, given[0])
        engine.require_loadable(spec, run)
    for spec in specs:
        for name in (layout.group_name(spec.name), layout.seals_name(spec.name)):
            deletes(f"{site.storage.url}/{name}", site.storage.sizes(name))
        delete_teacher(site.storage, spec.name)


def _delete_leftovers(storage: Storage, locks: BuildLocks, spec: CacheSpec) -> None:
    """Delete what killed builds left, unless it can be what other parts are writing."""
    if storage.local_dir is None or not locks.is_alone(spec.name):
        return  # the last part does it; in an object store there is nothing of the kind
    for folder in (layout.group_name(spec.name), layout.seals_name(spec.name)):
        storage.delete_leftovers(folder)


def _begin(
    site: BuildContext, engine: Executor, spec: CacheSpec, imported: Imported | None
) -> None:
    """Make sure that a teacher has a sealed calibration and arrays of the right length."""
    if imported is not None:
        begin_with(site.storage, site.catalog, spec, *imported)
    calibration = sealed_calibration(site.storage, spec)
    if calibration is None:
        calibration = engine.calibrate(site, spec)
    resize_group(site.storage, spec, calibration, site.catalog.num_rows)


def _job(site: BuildContext, spec: CacheSpec, partition: Partition | None) -> TeacherJob:
    """Return what is missing of a teacher, as far as it is of this part of the build."""
    store = TeacherWriter(site.storage, spec.name, site.catalog.num_rows)
    store.require_images(site.catalog)
    rows = store.layout.rows_per_shard
    shards = [s for s in store.missing_shards if partition is None or partition.owns(s, rows)]
    return TeacherJob(spec, store, shards)


def _summary(
    site: BuildContext, spec: CacheSpec, done: JobResult, calibration_seconds: float
) -> BuildSummary:
    store = TeacherWriter(site.storage, spec.name, site.catalog.num_rows)
    skipped = _skipped_table(site.catalog, store.skipped)
    store.write_skipped(skipped)
    return BuildSummary(
        status=teacher_status(store, site.catalog),
        images_built=done.num_rows,
        skipped=dict(zip(*(skipped[name].to_pylist() for name in ("key", "reason")), strict=True)),
        seconds=done.seconds,
        calibration_seconds=calibration_seconds,
    )


def _skipped_table(catalog: Catalog, skipped: Mapping[int, str]) -> pa.Table:
    """Return row, key and reason of the images without features, in row order."""
    rows = np.array(sorted(skipped), np.int64)
    keys = catalog.index.take("key", np.searchsorted(catalog.rows, rows))
    reasons = pa.array([skipped[row] for row in rows.tolist()], pa.string())
    return pa.table({"row": pa.array(rows), "key": keys, "reason": reasons})
