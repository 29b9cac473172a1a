"""The engine for many machines: work items for the workers of a Ray cluster.

Comes in: which Zarr shards of which teachers are missing. Goes out: those, sealed. A worker is a
process with the teachers loaded and the local engine inside (``extract.ray.worker``), kept busy by
``extract.ray.worker_pool``. The driver loads no teacher and needs no GPU; it holds the build's
locks.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from movekd.cache import layout
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError
from movekd.extract.calibrate import sealed_calibration
from movekd.extract.executor import BuildContext, JobResult, TeacherJob
from movekd.extract.locks import lock_name
from movekd.extract.options import BuildOptions
from movekd.extract.ray import worker
from movekd.extract.ray.cluster import WORKER_CPUS, RayCluster
from movekd.extract.ray.environment import NodeEnvironment, installed_versions
from movekd.extract.ray.worker import Assignment, Item, Report
from movekd.extract.ray.worker_pool import Pool

ITEMS_A_WORKER = 8
"""Work items that each worker gets at least, as long as an item is more than one Zarr shard."""


class RayExecutor:
    """Teachers that run in the workers of a Ray cluster, while that is connected."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._surroundings: NodeEnvironment | None = None

    def begin(self, site: BuildContext, specs: Sequence[CacheSpec]) -> None:
        """Refuse nodes that are not like the driver, or that do not see what it builds."""
        storage = site.storage
        if storage.url.startswith("memory:"):
            raise ConfigError(f"{storage.url} is of one process; workers cannot see it.")
        if storage.local_dir is None:
            marks, url = [layout.CACHE_JSON], storage.url
        else:  # the lock says which process on which host holds it
            marks = [lock_name(spec.name) for spec in specs]
            url = str(storage.local_dir.absolute())
        catalog = site.catalog
        self._surroundings = NodeEnvironment(
            cache_url=url,
            data_dir=str(Path(site.corpus.data_dir).absolute()),
            versions=installed_versions(),
            marks=storage.read_many(marks),
            corpus_fingerprint=catalog.corpus_fingerprint,
            num_images=catalog.num_images,
        )
        with self._cluster.sentences():
            self._cluster.require_alike(self._surroundings)

    def require_loadable(self, spec: CacheSpec, options: BuildOptions) -> None:
        """Load a teacher in a worker."""
        self._once(worker.require_loadable, self._assignment([spec], options))

    def calibrate(self, site: BuildContext, spec: CacheSpec) -> Calibration:
        """Seal a new teacher's calibration and make its group, in a worker."""
        what = f"{spec.name}: calibrate"
        num_images = min(spec.calibration_images, len(site.corpus))
        site.progress(what, 0, num_images)
        self._once(worker.calibrate, self._assignment([spec], site.options))
        site.progress(what, num_images, num_images)
        calibration = sealed_calibration(site.storage, spec)
        assert calibration is not None
        return calibration

    def build(self, site: BuildContext, jobs: Sequence[TeacherJob]) -> list[JobResult]:
        """Build and seal the Zarr shards of some teachers, in all workers."""
        started = time.perf_counter()
        items = work_items(jobs, self._cluster.num_places())
        by_name = {job.spec.name: job for job in jobs}
        num_rows, seconds = dict.fromkeys(by_name, 0), dict.fromkeys(by_name, 0.0)
        total = sum(_num_rows(site, job, job.shards) for job in jobs)
        what = f"{', '.join(job.spec.name for job in jobs if job.shards)}: build"
        assignment = self._assignment([job.spec for job in jobs if job.shards], site.options)
        if items:
            with self._cluster.sentences():
                for item, report in Pool(self._cluster, assignment).work_through(items):
                    for name, shards in item.items():
                        num_rows[name] += _num_rows(site, by_name[name], shards)
                        seconds[name] += report.seconds[name]
                    site.progress(what, sum(num_rows.values()), total)
        # of the wall's time, as much as was the teacher's in the workers
        scale = (time.perf_counter() - started) / max(sum(seconds.values()), 1e-9)
        return [JobResult(num_rows[name], seconds[name] * scale) for name in by_name]

    def _once(self, task: Any, assignment: Assignment) -> None:
        """Run a task in one process of the cluster, with what a worker has."""
        with self._cluster.sentences():
            remote = self._cluster.ray.remote(
                num_cpus=WORKER_CPUS, num_gpus=self._cluster.num_gpus
            )(task)
            report: Report = self._cluster.ray.get(remote.remote(assignment))
        report.checked()

    def _assignment(self, specs: Sequence[CacheSpec], options: BuildOptions) -> Assignment:
        """Return what workers are told; they use as many threads as the driver would."""
        assert self._surroundings is not None
        options = replace(
            options,
            num_workers=self._cluster.num_decoders,
            num_threads=options.num_threads or torch.get_num_threads(),
        )
        return Assignment(self._surroundings, specs, options)


def work_items(jobs: Sequence[TeacherJob], num_workers: int) -> list[Item]:
    """Return the missing Zarr shards in groups, teacher -> shards: what a worker takes at once.

    A group is a row range that is whole Zarr shards of every teacher, so that an image is decoded
    once for all of them. It grows to 1,024 rows, because the device idles between two groups, as
    long as there are enough for every worker.
    """
    jobs = [job for job in jobs if job.shards]
    rows = max((job.store.layout.rows_per_shard for job in jobs), default=1)
    items = _grouped(jobs, rows)
    while 2 * rows <= layout.MAX_SHARD_ROWS:
        rows *= 2
        larger = _grouped(jobs, rows)
        if len(larger) < ITEMS_A_WORKER * num_workers:
            break
        items = larger
    return items


def _grouped(jobs: Sequence[TeacherJob], rows: int) -> list[Item]:
    groups: dict[int, Item] = {}
    for job in jobs:
        for shard in job.shards:
            group = groups.setdefault(shard * job.store.layout.rows_per_shard // rows, {})
            group.setdefault(job.spec.name, []).append(shard)
    return [group for _, group in sorted(groups.items())]


def _num_rows(site: BuildContext, job: TeacherJob, shards: Sequence[int]) -> int:
    """Return how many rows of some Zarr shards stand for a view of an image."""
    wanted = torch.zeros(job.store.layout.num_shards(site.catalog.num_rows), dtype=torch.bool)
    wanted[list(shards)] = True
    of_rows = torch.from_numpy(site.catalog.rows // job.store.layout.rows_per_shard)
    return int(wanted[of_rows].sum())
