"""Executors: where the teachers of a build run, and the one for this machine.

Input: which Zarr shards of which teachers to build. Output: those, sealed. ``extract.run`` decides
which. A worker of ``extract.ray.executor`` uses the local executor of this file, so the same code
builds a Zarr shard on one machine and on many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from movekd.cache.layout import calibration_name
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec
from movekd.errors import CacheError
from movekd.extract.calibrate import calibrate, calibrated_options, sealed_calibration
from movekd.extract.locks import sealing
from movekd.extract.options import BuildContext, BuildOptions
from movekd.extract.teacher_loop import TeacherBuild, TeacherJob, run_teachers
from movekd.teachers import Teacher, load_teacher


@dataclass(frozen=True)
class JobResult:
    """Result of a job."""

    num_rows: int
    """Views of images that were processed."""
    seconds: float


class Executor(Protocol):
    """Where teachers run. The build holds its locks and calls the methods in this order."""

    def begin(self, context: BuildContext, specs: Sequence[CacheSpec]) -> None:
        """Check what can be checked before the build starts."""

    def require_loadable(self, spec: CacheSpec, options: BuildOptions) -> None:
        """Refuse a teacher that cannot be loaded, before anything of it is deleted."""

    def calibrate(self, context: BuildContext, spec: CacheSpec) -> Calibration:
        """Seal a new teacher's calibration and create its group."""

    def build(self, context: BuildContext, jobs: Sequence[TeacherJob]) -> list[JobResult]:
        """Build and seal the Zarr shards of all jobs; return one result per job."""


class LocalExecutor:
    """Runs teachers in this process. It loads a teacher once and keeps it."""

    def __init__(self) -> None:
        self._teachers: dict[str, Teacher] = {}

    def begin(self, context: BuildContext, specs: Sequence[CacheSpec]) -> None:
        """Set the number of threads if the options give one."""
        if context.options.num_threads is not None:
            torch.set_num_threads(context.options.num_threads)

    def require_loadable(self, spec: CacheSpec, options: BuildOptions) -> None:
        """Load a teacher on the CPU."""
        self._teachers[spec.name] = load_teacher(spec, "cpu", options.dtype)

    def calibrate(self, context: BuildContext, spec: CacheSpec) -> Calibration:
        """Seal a new teacher's calibration and create its group, unless another process has."""
        with sealing(context.storage, calibration_name(spec.name)):
            sealed = sealed_calibration(context.storage, spec)
            if sealed is not None:
                return sealed
            teacher = self._loaded(spec, context.options)
            calibration = calibrate(context, spec, teacher)
        if not context.options.concurrent:  # make room for the next teacher
            teacher.to("cpu")
        return calibration

    def build(self, context: BuildContext, jobs: Sequence[TeacherJob]) -> list[JobResult]:
        """Build and seal the Zarr shards of all jobs; the teachers take turns on the device."""
        builds: list[TeacherBuild] = []
        for job in jobs:
            teacher = self.teacher(job, context.options) if job.shards else None
            options = calibrated_options(context.options, job.store.calibration)
            builds.append(TeacherBuild(job, context.catalog, teacher, options))
            if teacher is not None and len(jobs) > 1 and not options.concurrent:
                builds[-1].move_to("cpu")
        run_teachers(builds, context)
        return [JobResult(build.num_done, build.seconds) for build in builds]

    def teacher(self, job: TeacherJob, options: BuildOptions) -> Teacher:
        """Return a job's teacher on the device, with the weights that the cache was started with.

        Raises:
            CacheError: the weights differ.
        """
        options = calibrated_options(options, job.store.calibration)
        teacher = self._loaded(job.spec, options)
        sealed = job.store.calibration.weights_sha256
        if teacher.weights_sha256 != sealed:
            raise CacheError(
                f"the weights of '{job.spec.name}' have SHA-256 {teacher.weights_sha256[:16]}..., "
                f"the cache was started with {sealed[:16]}...; bring those weights back, or build "
                "the teacher again with --overwrite."
            )
        if options.compile:
            teacher.compile_forward()
        return teacher

    def _loaded(self, spec: CacheSpec, options: BuildOptions) -> Teacher:
        if spec.name not in self._teachers:
            self._teachers[spec.name] = load_teacher(spec, options.device, options.dtype)
        return self._teachers[spec.name].to(device=options.device)
