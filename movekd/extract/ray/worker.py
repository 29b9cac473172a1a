"""Code of the worker processes in a Ray cluster: check the node, then run the local executor.

Input: an assignment, then Zarr shards by teacher. Output: those, sealed in the cache, and a report.

Errors are returned in reports. Ray retries a task that raises, and then shows its own traceback.
"""

import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from movekd import errors
from movekd.cache import layout
from movekd.cache.catalog import open_catalog
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import open_storage
from movekd.cache.verify import shard_problems
from movekd.cache.writer import TeacherWriter
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, MovekdError
from movekd.extract.executor import LocalExecutor
from movekd.extract.options import BuildContext, BuildOptions
from movekd.extract.ray.environment import (
    NodeEnvironment,
    check_visible,
    installed_versions,
    node_name,
    require_versions,
)
from movekd.extract.teacher_loop import TeacherJob

Item = dict[str, list[int]]
"""Work that a worker takes at once: teacher -> Zarr shards."""


@dataclass(frozen=True)
class Assignment:
    """What a worker needs: the driver's environment, the teachers, and the options."""

    environment: NodeEnvironment
    specs: Sequence[CacheSpec]
    options: BuildOptions


@dataclass(frozen=True)
class Report:
    """Result of a worker.

    Attributes:
        seconds: teacher -> how long it ran.
        failure: class name of an error, or empty.
        message: message of the error.
        trace: traceback of the error, for ``--debug``.
        sentences: what the user should know.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    message: str = ""
    trace: str = ""
    sentences: Sequence[str] = ()

    def checked(self) -> "Report":
        """Return the report, or raise the error in it."""
        if not self.failure:
            return self
        kind = getattr(errors, self.failure)
        assert issubclass(kind, MovekdError)
        error = kind(self.message)
        error.add_note(self.trace)
        raise error


class Worker:
    """A process that loads the teachers of a build once; Ray makes actors of this class."""

    def __init__(self, assignment: Assignment) -> None:
        self._executor = LocalExecutor()
        self._failure: Report | None = None
        try:
            self._context = open_context(assignment, self._executor)
            self._stores = {
                spec.name: TeacherWriter(
                    self._context.storage, spec.name, self._context.catalog.num_rows
                )
                for spec in assignment.specs
            }
            self._specs = {spec.name: spec for spec in assignment.specs}
            for job in self._jobs({name: [] for name in self._specs}):
                self._executor.teacher(job, assignment.options)
        except Exception as error:  # travels in the report: Ray would try the same again
            self._failure = _failed(error, is_of_node=True)

    def loaded(self) -> Report:
        """Report that the teachers are loaded, or why not."""
        return self._failure or Report()

    def build(self, item: Item) -> Report:
        """Build the Zarr shards of an item that are not sealed yet."""
        try:
            jobs = self._jobs(item)
            results = self._executor.build(self._context, jobs)
            return Report({j.spec.name: r.seconds for j, r in zip(jobs, results, strict=True)})
        except Exception as error:  # as above
            return _failed(error)

    def _jobs(self, shards: Mapping[str, Sequence[int]]) -> list[TeacherJob]:
        """Return jobs for the shards that are not whole: a dead worker may have sealed some."""
        return [
            TeacherJob(
                self._specs[name],
                self._stores[name],
                [shard for shard in given if not self._is_whole(name, shard)],
            )
            for name, given in shards.items()
        ]

    def _is_whole(self, name: str, shard: int) -> bool:
        storage, catalog = self._context.storage, self._context.catalog
        is_sealed = storage.exists(layout.seal_name(name, shard))
        return is_sealed and not any(shard_problems(self._stores[name], catalog, [shard]))


def calibrate(assignment: Assignment) -> Report:
    """Calibrate the only teacher of an assignment."""
    sentences: list[str] = []
    try:
        executor = LocalExecutor()
        context = replace(open_context(assignment, executor), tell=sentences.append)
        executor.calibrate(context, assignment.specs[0])
    except Exception as error:
        return _failed(error)
    return Report(sentences=sentences)


def require_loadable(assignment: Assignment) -> Report:
    """Check that the only teacher of an assignment can be loaded."""
    try:
        executor = LocalExecutor()
        open_context(assignment, executor)
        executor.require_loadable(assignment.specs[0], assignment.options)
    except Exception as error:
        return _failed(error, is_of_node=True)
    return Report()


def open_context(assignment: Assignment, executor: LocalExecutor) -> BuildContext:
    """Open the driver's cache and corpus, after checking that this node sees the same ones."""
    expected = assignment.environment
    require_versions(installed_versions(), expected.versions)
    check_visible(expected)
    storage = open_storage(expected.cache_url)
    corpus, catalog = open_corpus(expected.data_dir), open_catalog(storage)
    context = BuildContext(
        storage, corpus, catalog, assignment.options, lambda what, done, total: None
    )
    executor.begin(context, assignment.specs)
    return context


def _failed(error: Exception, is_of_node: bool = False) -> Report:
    """Return a report of an error; of a library's error only the first line."""
    node = _here()
    kind = type(error).__name__
    if not isinstance(error, MovekdError):
        first = (str(error).strip() or "no message").splitlines()[0][:300]
        message = (
            f"a worker on {node} failed: {kind}: {first} What is sealed is safe; --debug shows "
            "where."
        )
        kind = CacheError.__name__
    else:
        message = f"{node}: {error}" if is_of_node else str(error)
    return Report({}, kind, message, traceback.format_exc())


def _here() -> str:
    import ray

    return node_name(socket.gethostname(), ray.get_runtime_context().get_node_id())
