"""What runs in the processes of a Ray cluster: the local engine, and a look at where it is.

``extract.ray.executor`` starts it. Comes in: an assignment, then Zarr shards by teacher. Goes out:
those, sealed in the cache, and a report. Errors travel in reports, as sentences: one that is raised
arrives as a traceback of Ray, after Ray has tried the same again.
"""

import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from movekd import errors
from movekd.cache import layout
from movekd.cache.catalog import open_catalog
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import open_storage
from movekd.cache.writer import TeacherWriter
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, MovekdError
from movekd.extract.executor import BuildContext, LocalExecutor, TeacherJob
from movekd.extract.options import BuildOptions
from movekd.extract.ray.environment import (
    NodeEnvironment,
    check_visible,
    installed_versions,
    node_name,
    require_versions,
)

Item = dict[str, list[int]]
"""What a worker takes at once: teacher -> Zarr shards."""


@dataclass(frozen=True)
class Assignment:
    """What a worker is told: where it is, which teachers it runs, and how."""

    surroundings: NodeEnvironment
    specs: Sequence[CacheSpec]
    options: BuildOptions


@dataclass(frozen=True)
class Report:
    """What a worker answers.

    Attributes:
        seconds: teacher -> how long it had its turn.
        failure: name of an error's class, or empty.
        sentence: the error's message.
        trace: where it comes from, for ``--debug``.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    sentence: str = ""
    trace: str = ""

    def checked(self) -> "Report":
        """Return the report, or raise the error that it tells of."""
        if not self.failure:
            return self
        kind = getattr(errors, self.failure)
        assert issubclass(kind, MovekdError)
        error = kind(self.sentence)
        error.add_note(self.trace)
        raise error


class Worker:
    """A process with the teachers of a build loaded, once; the class that Ray makes actors of.

    Args:
        assignment: what it works on.
    """

    def __init__(self, assignment: Assignment) -> None:
        self._engine = LocalExecutor()
        self._failure: Report | None = None
        try:
            self._site = _site(assignment, self._engine)
            self._stores = {
                spec.name: TeacherWriter(self._site.storage, spec.name, self._site.catalog.num_rows)
                for spec in assignment.specs
            }
            self._specs = {spec.name: spec for spec in assignment.specs}
            for job in self._jobs({name: [] for name in self._specs}):
                self._engine.teacher(job, assignment.options)
        except Exception as error:
            self._failure = _failed(error, is_of_node=True)

    def loaded(self) -> Report:
        """Say that the teachers are loaded, or why they are not."""
        return self._failure or Report()

    def build(self, item: Item) -> Report:
        """Build the Zarr shards of one work item that nobody has built."""
        try:
            jobs = self._jobs(item)
            done = self._engine.build(self._site, jobs)
            names = [job.spec.name for job in jobs]
            return Report(dict(zip(names, (each.seconds for each in done), strict=True)))
        except Exception as error:
            return _failed(error)

    def _jobs(self, shards: Mapping[str, Sequence[int]]) -> list[TeacherJob]:
        """Return what is still missing of some Zarr shards: an item can come a second time."""
        exists = self._site.storage.exists
        return [
            TeacherJob(
                self._specs[name],
                self._stores[name],
                [shard for shard in given if not exists(layout.seal_name(name, shard))],
            )
            for name, given in shards.items()
        ]


def calibrate(assignment: Assignment) -> Report:
    """Calibrate the only teacher of an assignment."""
    try:
        engine = LocalExecutor()
        engine.calibrate(_site(assignment, engine), assignment.specs[0])
    except Exception as error:
        return _failed(error)
    return Report()


def require_loadable(assignment: Assignment) -> Report:
    """See that the only teacher of an assignment can be loaded."""
    try:
        engine = LocalExecutor()
        _site(assignment, engine)
        engine.require_loadable(assignment.specs[0], assignment.options)
    except Exception as error:
        return _failed(error, is_of_node=True)
    return Report()


def _site(assignment: Assignment, engine: LocalExecutor) -> BuildContext:
    """Open what the driver works on, once it is clear that it is the same."""
    expected = assignment.surroundings
    require_versions(installed_versions(), expected.versions)
    check_visible(expected)
    storage = open_storage(expected.cache_url)
    corpus, catalog = open_corpus(expected.data_dir), open_catalog(storage)
    site = BuildContext(
        storage, corpus, catalog, assignment.options, lambda what, done, total: None
    )
    engine.begin(site, assignment.specs)
    return site


def _failed(error: Exception, is_of_node: bool = False) -> Report:
    """Return what is said of an error; of one that is none of ours, its first line and its node."""
    node = _here()
    kind = type(error).__name__
    if not isinstance(error, MovekdError):
        first = (str(error).strip() or "no message").splitlines()[0][:300]
        sentence = (
            f"a worker on {node} failed: {kind}: {first} What is sealed is safe; --debug shows "
            "where."
        )
        kind = CacheError.__name__
    else:
        sentence = f"{node}: {error}" if is_of_node else str(error)
    return Report({}, kind, sentence, traceback.format_exc())


def _here() -> str:
    import ray

    return node_name(socket.gethostname(), ray.get_runtime_context().get_node_id())
