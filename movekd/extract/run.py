"""Build a cache: calibrate new teachers, run all of them, write and seal what is missing.

Input: a corpus and the specs of some teachers. Output: one Zarr group per teacher.

The unit of work is one Zarr shard, a row range. A Zarr shard without a seal does not exist, so a
rerun builds only what is missing. This file does what holds for all Zarr shards.
``extract.executor`` builds them on this machine, ``extract.ray.executor`` on many machines.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from movekd.cache import layout
from movekd.cache.catalog import update_catalog
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage, open_storage
from movekd.cache.verify import TeacherStatus, shard_problems, teacher_status
from movekd.cache.writer import TeacherWriter, resize_group
from movekd.corpus.anyres import Views
from movekd.corpus.index import Corpus
from movekd.corpus.record import require_as_packed
from movekd.corpus.transforms import Geometry
from movekd.errors import CacheError, ConfigError
from movekd.extract.calibrate import (
    calibrated_options,
    delete_teacher,
    import_calibration,
    read_other_calibration,
    sealed_calibration,
)
from movekd.extract.executor import Executor, JobResult, LocalExecutor
from movekd.extract.locks import BuildLocks, build_lock
from movekd.extract.options import BuildContext, BuildOptions, Progress, Tell, print_error
from movekd.extract.partition import WHOLE, Partition
from movekd.extract.sealed_teacher import (
    count_shards,
    delete_leftovers,
    open_sealed,
    skipped_table,
)
from movekd.extract.spec_defaults import with_defaults
from movekd.extract.teacher_loop import TeacherJob
from movekd.teachers.providers import find_provider

Imported = tuple[Calibration, ChannelStats]


@dataclass(frozen=True)
class BuildSummary:
    """Result of a build for one teacher.

    Attributes:
        status: what the cache now holds of the teacher.
        images_built: rows that this build wrote; a row is a view of an image.
        skipped: key -> why the image could not be read, over all builds.
        seconds: duration of this build without the calibration.
        calibration_seconds: duration of the calibration.
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
    executor: Executor | None = None,
    partition: Partition | None = None,
    replace: bool = False,
    is_verifying: bool = False,
    channel_stats: str | Path | Storage | None = None,
    deletes: Callable[[str, Mapping[str, int]], None] = lambda folder, sizes: None,
    tell: Tell = print_error,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[BuildSummary]:
    """Build what is missing of some teachers over the same decoded images; yield one summary each.

    Zarr shards whose sealed files are gone or have another size are built again, after saying so.

    A build that is interrupted at any instant and run again leaves the same bytes as one that is
    not, whichever executor runs it and in however many parts. This holds for equal device, dtype,
    number of threads and library versions.

    Args:
        url: the cache: a folder, or ``s3://bucket/prefix``.
        corpus: the images.
        specs: the teachers.
        geometry: how every image becomes a square; the same for the whole cache.
        views: whether to build the tiles of every image as well; the same for the whole cache.
        options: where and how to run.
        executor: what runs the teachers. Default: this process.
        partition: which part of the Zarr shards to build. Default: all. The first part that starts
            calibrates, the others wait for it.
        replace: delete what the cache holds of these teachers first.
        is_verifying: compare every sealed byte first, and build again what differs. Default: only
            existence and size.
        channel_stats: another cache. A new teacher takes over its sealed calibration, so that
            caches built on several machines are encoded alike. Default: calibrate on the corpus.
        deletes: called before ``replace`` deletes a folder, with the folder and the sizes of its
            files, after all checks have passed.
        tell: called with sentences about sealed files that are wrong and will be built again, and
            about features that hardly vary. Default: prints them to standard error.
        progress: called after each batch.

    Raises:
        CacheError: the cache has other views, or another geometry, corpus, spec or weights (the
            message names which); or another build of the teacher is running.
        CorpusError: a table of the corpus was changed since it was packed.
        ConfigError: an unknown provider, or ``replace`` with a part of a build.
    """
    if partition is not None and replace:
        raise ConfigError(
            f"--partition {partition} builds one of {partition.count} parts and --overwrite "
            "deletes them all. Run a whole build with --overwrite, stop it after the calibration, "
            "then start the parts without --overwrite. Or build into another --cache."
        )
    for spec in specs:
        find_provider(spec)
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image; nothing to build.")
    require_as_packed(corpus.data_dir)
    storage, executor = open_storage(url), executor or LocalExecutor()
    partition = partition or WHOLE
    with build_lock(storage, ".lock", wait=True):  # builds of other teachers write these files too
        for name in (layout.CACHE_JSON, layout.INDEX, layout.NAMES):
            storage.delete_leftovers(name)
        catalog = update_catalog(storage, corpus, geometry, views)
    context = BuildContext(storage, corpus, catalog, options, progress, tell)
    with BuildLocks(storage, [spec.name for spec in specs], partition) as locks:
        with locks.settling():
            source = None if channel_stats is None else open_storage(channel_stats)
            own, asked = None if replace else storage, specs
            specs = [with_defaults(spec, own=own, other=source) for spec in asked]
            executor.begin(context, specs)
            imported: dict[str, Imported] = {}
            if source is not None:  # read it before anything is deleted
                imported = {s.name: read_other_calibration(source, s, geometry) for s in asked}
            if replace:
                _replace(context, executor, specs, imported, deletes)
            jobs, calibration_seconds = [], []
            for spec in specs:
                delete_leftovers(storage, locks, spec.name)
                started = time.perf_counter()
                _settle_calibration(context, executor, spec, imported.get(spec.name), tell)
                calibration_seconds.append(time.perf_counter() - started)
                store, wrong = open_sealed(storage, catalog, spec.name, tell)
                if is_verifying:
                    wrong |= _verified(context, store, wrong, partition, tell)
                size = store.layout.rows_per_shard
                lacking = sorted({*store.missing_shards, *wrong})
                shards = [s for s in lacking if partition.owns(s, size)]
                jobs.append(TeacherJob(spec, store, shards))
        results = executor.build(context, jobs)
        with locks.settling():
            for spec in specs:  # of workers that were killed meanwhile
                delete_leftovers(storage, locks, spec.name)
                locks.remove_dead(spec.name)
            summaries = [
                _summary(context, *each)
                for each in zip(specs, results, calibration_seconds, strict=True)
            ]
    yield from summaries


def _replace(
    context: BuildContext,
    executor: Executor,
    specs: Sequence[CacheSpec],
    imported: Mapping[str, Imported],
    deletes: Callable[[str, Mapping[str, int]], None],
) -> None:
    """Delete what the cache holds of some teachers, once all of them are known to load."""
    for spec in specs:
        options = context.options
        if spec.name in imported:
            options = calibrated_options(options, imported[spec.name][0])
        executor.require_loadable(spec, options)
    for spec in specs:
        for name in (layout.group_name(spec.name), layout.seals_name(spec.name)):
            deletes(f"{context.storage.url}/{name}", context.storage.sizes(name))
        delete_teacher(context.storage, spec.name)


def _settle_calibration(
    context: BuildContext,
    executor: Executor,
    spec: CacheSpec,
    imported: Imported | None,
    tell: Tell,
) -> None:
    """Make sure that a teacher has a sealed calibration and arrays of the right length."""
    name, group = layout.calibration_name(spec.name), layout.group_name(spec.name)
    if not context.storage.exists(name) and (left := context.storage.sizes(group)):
        tell(
            f"{spec.name}: {name} is missing (an interrupted --overwrite or calibration, or it was "
            f"deleted). Without it the {len(left)} files in {group} mean nothing; they are deleted "
            "and built again."
        )
    if imported is not None:
        import_calibration(context, spec, *imported)
    calibration = sealed_calibration(context.storage, spec)
    if calibration is None:
        calibration = executor.calibrate(context, spec)
    resize_group(context.storage, spec, calibration, context.catalog.num_rows)


def _verified(
    context: BuildContext,
    store: TeacherWriter,
    known: set[int],
    partition: Partition,
    tell: Tell,
) -> set[int]:
    """Return the sealed Zarr shards of this part that differ from their seals, read in full."""
    size, done = store.layout.rows_per_shard, 0
    left_out = {*store.missing_shards, *known}
    shards = [
        shard
        for shard in range(store.layout.num_shards(store.num_rows))
        if shard not in left_out and partition.owns(shard, size)
    ]
    sums = store.sums
    total = int(sums.size_bytes_S[np.isin(sums.shards_S, shards)].sum())

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        context.progress(f"{store.teacher}: verify, bytes", done, total)

    problems = list(shard_problems(store, context.catalog, shards, advance))
    wrong = {shard for shard, _ in problems}
    if wrong:
        first = f"{problems[0][1]} " + (f"{len(problems) - 1} more. " if problems[1:] else "")
        tell(f"{store.teacher}: {first}{count_shards(len(wrong))} built again.")
    return wrong


def _summary(
    context: BuildContext, spec: CacheSpec, result: JobResult, calibration_seconds: float
) -> BuildSummary:
    store = TeacherWriter(context.storage, spec.name, context.catalog.num_rows)
    skipped = skipped_table(context.catalog, store.skipped)
    store.write_skipped(skipped)
    return BuildSummary(
        status=teacher_status(store, context.catalog),
        images_built=result.num_rows,
        skipped=dict(zip(*(skipped[name].to_pylist() for name in ("key", "reason")), strict=True)),
        seconds=result.seconds,
        calibration_seconds=calibration_seconds,
    )
