"""Run tasks in a background thread while the device computes: encode features, then write them.

``extract.teacher_loop`` submits tasks and continues with the next batch.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, Self

P = ParamSpec("P")


class BackgroundWorker:
    """One thread that runs tasks in order and stops at the first error.

    The error is raised to the next caller of ``submit`` or ``wait``. As a context manager, the
    worker ends when all tasks are done. After an error it drops the queued ones.

    Args:
        name: name of the thread.
        num_waiting: how many tasks may be queued or running; ``submit`` blocks beyond that.
    """

    def __init__(self, name: str, num_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._num_waiting = num_waiting
        self._waiting: deque[Future[None]] = deque()
        self._has_failed = False

    def submit(self, task: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue a task. Raises the error of an earlier task."""
        while len(self._waiting) >= self._num_waiting:
            self._waiting.popleft().result()

        def guarded() -> None:
            if self._has_failed:  # later tasks depend on the failed one
                return
            try:
                task(*args, **kwargs)
            except BaseException:
                self._has_failed = True
                raise

        self._waiting.append(self._pool.submit(guarded))

    def wait(self) -> None:
        """Return when all tasks are done. Raises the error of a task."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
