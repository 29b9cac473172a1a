"""The executor for many machines: split a build into items for the workers of a Ray cluster.

Input: which Zarr shards of which teachers are missing. Output: those, sealed.

A worker is a process that has loaded the teachers and runs the local executor
(``extract.ray.worker``). ``extract.ray.worker_pool`` gives it items. The driver loads no teacher,
needs no GPU, and holds the locks of the build.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from movekd.cache import layout
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec
from movekd.extract.calibrate import sealed_calibration
from movekd.extract.executor import JobResult
from movekd.extract.options import BuildContext, BuildOptions
from movekd.extract.ray import worker
from movekd.extract.ray.cluster import WORKER_CPUS, RayCluster
from movekd.extract.ray.environment import NodeEnvironment, driver_environment
from movekd.extract.ray.worker import Assignment, Item, Report
from movekd.extract.ray.worker_pool import WorkerPool
from movekd.extract.teacher_loop import TeacherJob

ITEMS_PER_WORKER = 8
"""Minimum number of items per worker, as long as an item holds more than one Zarr shard."""


class RayExecutor:
    """Runs teachers in the workers of a connected Ray cluster."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._environment: NodeEnvironment | None = None

    def begin(self, context: BuildContext, specs: Sequence[CacheSpec]) -> None:
        """Refuse nodes with other versions than the driver, or that do not see its cache."""
        self._environment = driver_environment(context, specs)
        with self._cluster.errors_as_messages():
            self._cluster.require_alike(self._environment)

    def require_loadable(self, spec: CacheSpec, options: BuildOptions) -> None:
        """Load a teacher in a worker."""
        self._once(worker.require_loadable, self._assignment([spec], options))

    def calibrate(self, context: BuildContext, spec: CacheSpec) -> Calibration:
        """Seal a new teacher's calibration and create its group, in a worker."""
        label = f"{spec.name}: calibrate"
        num_images = min(spec.calibration_images, len(context.corpus))
        context.progress(label, 0, num_images)
        report = self._once(worker.calibrate, self._assignment([spec], context.options))
        for sentence in report.sentences:
            context.tell(sentence)
        context.progress(label, num_images, num_images)
        calibration = sealed_calibration(context.storage, spec)
        assert calibration is not None
        return calibration

    def build(self, context: BuildContext, jobs: Sequence[TeacherJob]) -> list[JobResult]:
        """Build and seal the Zarr shards of all jobs in the workers."""
        started = time.perf_counter()
        items = work_items(jobs, self._cluster.num_workers())
        by_name = {job.spec.name: job for job in jobs}
        num_rows, seconds = dict.fromkeys(by_name, 0), dict.fromkeys(by_name, 0.0)
        total = sum(_num_rows(context, job, job.shards) for job in jobs)
        label = f"{', '.join(job.spec.name for job in jobs if job.shards)}: build"
        assignment = self._assignment([job.spec for job in jobs if job.shards], context.options)
        if items:
            with self._cluster.errors_as_messages():
                for item, report in WorkerPool(self._cluster, assignment).work_through(items):
                    for name, shards in item.items():
                        num_rows[name] += _num_rows(context, by_name[name], shards)
                        seconds[name] += report.seconds[name]
                    context.progress(label, sum(num_rows.values()), total)
        # Workers run in parallel, so their seconds are scaled to sum up to the elapsed time.
        scale = (time.perf_counter() - started) / max(sum(seconds.values()), 1e-9)
        return [JobResult(num_rows[name], seconds[name] * scale) for name in by_name]

    def _once(self, task: Any, assignment: Assignment) -> Report:
        """Run a task in one process of the cluster that has a worker's size."""
        with self._cluster.errors_as_messages():
            remote = self._cluster.ray.remote(
                num_cpus=WORKER_CPUS, num_gpus=self._cluster.num_gpus
            )(task)
            report: Report = self._cluster.ray.get(remote.remote(assignment))
        report.checked()
        return report

    def _assignment(self, specs: Sequence[CacheSpec], options: BuildOptions) -> Assignment:
        """Return what workers need; they use as many threads as the driver would."""
        assert self._environment is not None
        options = replace(
            options,
            num_workers=self._cluster.num_decoders,
            num_threads=options.num_threads or torch.get_num_threads(),
        )
        return Assignment(self._environment, specs, options)


def work_items(jobs: Sequence[TeacherJob], num_workers: int) -> list[Item]:
    """Return the missing Zarr shards as items, teacher -> shards; a worker takes one at a time.

    An item is a row range that holds whole Zarr shards of every teacher, so that an image is
    decoded once for all of them. Items grow up to 1,024 rows, because the device idles between two
    items, as long as every worker gets enough of them.
    """
    jobs = [job for job in jobs if job.shards]
    rows = max((job.store.layout.rows_per_shard for job in jobs), default=1)
    items = _grouped(jobs, rows)
    while 2 * rows <= layout.MAX_SHARD_ROWS:
        rows *= 2
        larger = _grouped(jobs, rows)
        if len(larger) < ITEMS_PER_WORKER * num_workers:
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


def _num_rows(context: BuildContext, job: TeacherJob, shards: Sequence[int]) -> int:
    """Return how many rows of some Zarr shards stand for a view of an image."""
    wanted = torch.zeros(job.store.layout.num_shards(context.catalog.num_rows), dtype=torch.bool)
    wanted[list(shards)] = True
    of_rows = torch.from_numpy(context.catalog.rows // job.store.layout.rows_per_shard)
    return int(wanted[of_rows].sum())
