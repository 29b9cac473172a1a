"""Who runs the teachers of a build, and the engine for one machine.

Comes in: which Zarr shards of which teachers are to be built. Goes out: those, sealed.
``extract.run`` decides which; a worker of ``extract.ray.executor`` has the engine of this file
inside, so that a Zarr shard is built by the same code wherever that is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from movekd.cache.catalog import Catalog
from movekd.cache.schema import Calibration
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import Storage
from movekd.cache.writer import TeacherWriter
from movekd.corpus.index import Corpus
from movekd.errors import CacheError
from movekd.extract.calibrate import calibrate, sealed_calibration, settled
from movekd.extract.locks import calibrating
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.pipeline import TeacherBuild
from movekd.extract.teacher_loop import run_teachers
from movekd.teachers import Teacher, load_teacher


@dataclass(frozen=True)
class BuildContext:
    """What everything in one build works on and with."""

    storage: Storage
    corpus: Corpus
    catalog: Catalog
    options: BuildOptions
    progress: Progress


@dataclass(frozen=True)
class TeacherJob:
    """Zarr shards of one teacher that are to be built."""

    spec: CacheSpec
    store: TeacherWriter
    shards: Sequence[int]


@dataclass(frozen=True)
class JobResult:
    """What became of a job."""

    num_rows: int
    """Views of images that have passed."""
    seconds: float


class Executor(Protocol):
    """Where teachers run; its methods are called in this order, with the build's locks held."""

    def begin(self, site: BuildContext, specs: Sequence[CacheSpec]) -> None:
        """Refuse what can be seen at once not to work."""
        ...

    def require_loadable(self, spec: CacheSpec, options: BuildOptions) -> None:
        """Refuse a teacher that cannot be loaded, before anything of it is deleted."""
        ...

    def calibrate(self, site: BuildContext, spec: CacheSpec) -> Calibration:
        """Seal a new teacher's calibration and make its group."""
        ...

    def build(self, site: BuildContext, jobs: Sequence[TeacherJob]) -> list[JobResult]:
        """Build and seal the Zarr shards of some teachers; return what became of each job."""
        ...


class LocalExecutor:
    """Teachers that run in this process. Those that were loaded once stay so."""

    def __init__(self) -> None:
        self._teachers: dict[str, Teacher] = {}

    def begin(self, site: BuildContext, specs: Sequence[CacheSpec]) -> None:
        """Fix the number of threads where it is given."""
        if site.options.num_threads is not None:
            torch.set_num_threads(site.options.num_threads)

    def require_loadable(self, spec: CacheSpec, options: BuildOptions) -> None:
        """Load a teacher, away from the device."""
        self._teachers[spec.name] = load_teacher(spec, "cpu", options.dtype)

    def calibrate(self, site: BuildContext, spec: CacheSpec) -> Calibration:
        """Seal a new teacher's calibration and make its group, unless it is there by now."""
        with calibrating(site.storage, spec.name):
            sealed = sealed_calibration(site.storage, spec)
            if sealed is not None:
                return sealed
            teacher = self._loaded(spec, site.options)
            calibration = calibrate(
                site.storage,
                site.corpus,
                site.catalog,
                spec,
                teacher,
                site.options,
                site.progress,
            )
        if not site.options.concurrent:  # the next one calibrates
            teacher.to("cpu")
        return calibration

    def build(self, site: BuildContext, jobs: Sequence[TeacherJob]) -> list[JobResult]:
        """Build and seal the Zarr shards of some teachers, which take turns on the device."""
        builds: list[TeacherBuild] = []
        for job in jobs:
            teacher = self.teacher(job, site.options) if job.shards else None
            run = settled(site.options, job.store.calibration)
            builds.append(TeacherBuild(job.store, job.shards, site.catalog, teacher, job.spec, run))
            if teacher is not None and len(jobs) > 1 and not run.concurrent:
                builds[-1].move_to("cpu")
        run_teachers(builds, site.corpus, site.catalog, site.options, site.progress)
        return [JobResult(build.num_done, build.seconds) for build in builds]

    def teacher(self, job: TeacherJob, options: BuildOptions) -> Teacher:
        """Return a job's teacher on the device, if it is the one that the cache was begun with.

        Raises:
            CacheError: its weights are others.
        """
        run = settled(options, job.store.calibration)
        teacher = self._loaded(job.spec, run)
        begun = job.store.calibration.weights_sha256
        if teacher.weights_sha256 != begun:
            raise CacheError(
                f"the weights of '{job.spec.name}' have SHA-256 {teacher.weights_sha256[:16]}..., "
                f"the cache was begun with {begun[:16]}...; bring those weights back, or build "
                "anew with --overwrite."
            )
        if run.compile:
            teacher.compile_forward()
        return teacher

    def _loaded(self, spec: CacheSpec, options: BuildOptions) -> Teacher:
        if spec.name not in self._teachers:
            self._teachers[spec.name] = load_teacher(spec, options.device, options.dtype)
        return self._teachers[spec.name].to(device=options.device)
