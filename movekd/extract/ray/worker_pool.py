"""The workers of a build in a Ray cluster: hired, given one work item at a time, replaced if lost.

Comes in: an assignment, and work items from ``extract.ray.executor``. Goes out: a report of each
item,
in the order in which they are finished. A worker loads the teachers once and keeps them. One that
dies takes nothing with it but its item's time: the item goes to another worker, which builds what
of it is not sealed. RowIds for workers are those of the nodes that there are at the moment.
"""

import contextlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from movekd.errors import CacheError
from movekd.extract.ray.cluster import WORKER_CPUS, RayCluster
from movekd.extract.ray.worker import Assignment, Item, Report, Worker

LIVES = 5
"""So many workers may die over one work item, or loading in each place, before it is a failure."""
LOOK_S = 10.0
"""How often, at least, the cluster is asked whether nodes have joined."""

Awaited = tuple[Any, int | None]
"""A worker, and the number of the item that it has; None while it loads."""


class Pool:
    """Workers of one build; ``work_through`` may be called once.

    Args:
        cluster: where they run, connected.
        assignment: what all of them are told.
    """

    def __init__(self, cluster: RayCluster, assignment: Assignment) -> None:
        self._cluster, self._ray = cluster, cluster.ray
        self._assignment = assignment
        self._worker = self._ray.remote(
            num_cpus=WORKER_CPUS,
            num_gpus=cluster.num_gpus,
            max_restarts=0,  # a restarted one would sit on its item until there is room for it
            scheduling_strategy="SPREAD",
        )(Worker)
        self._awaited: dict[Any, Awaited] = {}
        self._hired: list[Any] = []
        self._idle: list[Any] = []
        self._deaths: Counter[int | None] = Counter()

    def work_through(self, items: Sequence[Item]) -> Iterator[tuple[Item, Report]]:
        """Yield every item with what became of it, as workers finish them.

        Raises:
            MovekdError: what a worker failed with.
            CacheError: workers keep dying.
        """
        waiting = deque(range(len(items)))
        try:
            while waiting or any(number is not None for _, number in self._awaited.values()):
                self._hire(len(waiting))
                while waiting and self._idle:
                    worker, first = self._idle.pop(), waiting.popleft()
                    self._awaited[worker.build.remote(items[first])] = worker, first
                answers = list(self._awaited)
                for answer in self._ray.wait(answers, num_returns=1, timeout=LOOK_S)[0]:
                    worker, number = self._awaited.pop(answer)
                    report = self._answer(answer, worker, number)
                    if report is not None:
                        self._idle.append(worker)
                        if number is not None:
                            yield items[number], report
                    elif number is not None:
                        waiting.appendleft(number)
        finally:
            for worker in list(self._hired):
                self._dismiss(worker)

    def _hire(self, num_waiting: int) -> None:
        """Start as many workers as there are places and items for; Ray waits for places."""
        num_busy = sum(number is not None for _, number in self._awaited.values())
        wanted = min(self._cluster.num_places(), num_waiting + num_busy)
        for _ in range(wanted - len(self._hired)):
            worker = self._worker.remote(self._assignment)
            self._hired.append(worker)
            self._awaited[worker.loaded.remote()] = worker, None

    def _answer(self, answer: Any, worker: Any, number: int | None) -> Report | None:
        """Return a worker's report, or None if it has died."""
        exceptions = self._ray.exceptions
        try:
            report: Report = self._ray.get(answer)
        except (
            exceptions.RayActorError,
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
            exceptions.OutOfMemoryError,
        ) as error:
            self._dismiss(worker)  # one that is merely out of reach as well
            self._deaths[number] += 1
            if self._deaths[number] >= LIVES * (
                1 if number is not None else len(self._awaited) + 1
            ):
                doing = "loading the teachers" if number is None else "over the same work item"
                failure = CacheError(
                    f"{self._deaths[number]} workers died one after the other {doing}: killed for "
                    "want of memory, perhaps (--debug shows what Ray says). What is sealed is "
                    "safe; mend it and run the same command again."
                )
                failure.add_note(str(error))
                raise failure from None
            return None
        self._deaths.pop(None, None)
        return report.checked()

    def _dismiss(self, worker: Any) -> None:
        self._hired.remove(worker)
        with contextlib.suppress(self._ray.exceptions.RayError, ConnectionError):
            self._ray.kill(worker)
