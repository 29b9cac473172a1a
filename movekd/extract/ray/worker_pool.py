"""Start workers in a Ray cluster, give them one item at a time, and replace those that die.

Input: an assignment, and items from ``extract.ray.executor``. Output: one report per item, in the
order in which they finish.

A worker loads the teachers once and keeps them. If it dies, another worker gets its item and builds
what is not sealed. The number of workers follows the nodes that are alive.
"""

import contextlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from movekd.errors import CacheError
from movekd.extract.ray.cluster import WORKER_CPUS, RayCluster
from movekd.extract.ray.worker import Assignment, Item, Report, Worker

LIVES = 5
"""Workers that may die over one item, or while loading per running worker, until a build fails."""
LOOK_S = 10.0
"""Seconds between checks for nodes that have joined."""

Awaited = tuple[Any, int | None]
"""A worker, and the number of its item; None while it loads."""


class WorkerPool:
    """Workers of one build; ``work_through`` may be called once.

    Args:
        cluster: the connected cluster.
        assignment: what all workers need.
    """

    def __init__(self, cluster: RayCluster, assignment: Assignment) -> None:
        self._cluster, self._ray = cluster, cluster.ray
        self._assignment = assignment
        self._worker = self._ray.remote(
            num_cpus=WORKER_CPUS,
            num_gpus=cluster.num_gpus,
            max_restarts=0,  # Ray would keep the item of a restarting worker until it has room
            scheduling_strategy="SPREAD",
        )(Worker)
        self._awaited: dict[Any, Awaited] = {}
        self._workers: list[Any] = []
        self._idle: list[Any] = []
        self._deaths: Counter[int | None] = Counter()

    def work_through(self, items: Sequence[Item]) -> Iterator[tuple[Item, Report]]:
        """Yield every item with its report, as workers finish them.

        Raises:
            MovekdError: the error of a worker.
            CacheError: workers keep dying.
        """
        waiting = deque(range(len(items)))
        try:
            while waiting or any(number is not None for _, number in self._awaited.values()):
                self._start_workers(len(waiting))
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
            for worker in list(self._workers):
                self._stop(worker)

    def _start_workers(self, num_waiting: int) -> None:
        """Start the workers that nodes and items call for; Ray queues those without room."""
        num_busy = sum(number is not None for _, number in self._awaited.values())
        wanted = min(self._cluster.num_workers(), num_waiting + num_busy)
        for _ in range(wanted - len(self._workers)):
            worker = self._worker.remote(self._assignment)
            self._workers.append(worker)
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
            self._stop(worker)  # kills it if it is only out of reach
            self._deaths[number] += 1
            if self._deaths[number] >= LIVES * (
                1 if number is not None else len(self._awaited) + 1
            ):
                doing = "loading the teachers" if number is None else "over the same work item"
                failure = CacheError(
                    f"{self._deaths[number]} workers died one after the other {doing}; perhaps the "
                    "system killed them for lack of memory (--debug shows what Ray says). What is "
                    "sealed is safe; correct the cause and run the same command again."
                )
                failure.add_note(str(error))
                raise failure from None
            return None
        self._deaths.pop(None, None)
        return report.checked()

    def _stop(self, worker: Any) -> None:
        self._workers.remove(worker)
        with contextlib.suppress(self._ray.exceptions.RayError, ConnectionError):
            self._ray.kill(worker)
