"""Work that runs behind the device: encoding, and writing behind that.

``extract.pipeline`` hands tasks over and goes on with the next batch; the device never waits for
them unless too many are waiting.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self

P = ParamSpec("P")


class BackgroundWorker:
    """One thread that does tasks in order. The first error stops it, and whoever hands over next.

    As a context manager it ends with everything done, or, after an error, with what was waiting
    thrown away.

    Args:
        name: of the thread.
        num_waiting: tasks that may wait or run; ``submit`` blocks beyond that.
    """

    def __init__(self, name: str, num_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._num_waiting = num_waiting
        self._waiting: deque[Future[None]] = deque()
        self._has_failed = False

    def submit(self, task: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Hand a task over. Raises what an earlier one raised."""
        while len(self._waiting) >= self._num_waiting:
            self._waiting.popleft().result()

        def guarded() -> None:
            if self._has_failed:  # the tasks after a failed one stand on it
                return
            try:
                task(*args, **kwargs)
            except BaseException:
                self._has_failed = True
                raise

        self._waiting.append(self._pool.submit(guarded))

    def wait(self) -> None:
        """Return when everything is done. Raises what a task raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
