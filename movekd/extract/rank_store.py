"""What the ranks of one build under torchrun tell each other, through torchrun's key-value store.

    SESSION/hello/3    a random name that rank 3 has given itself for this start
    SESSION/task/NAME  what the rank of that name does
    SESSION/state/3    a counter that shows that rank 3 lives, and the rows it has done
    SESSION/result/3   what its task returned
    SESSION/failed/    the sentence of the first rank that failed

Rank 0 draws SESSION and sends tasks, the others do them. Both names are new in every start, because
torchrun can give ranks that it restarts the store of the dead ones. Restarts after a failure have
another key for SESSION as well, so that nobody reads an old ``failed``; those for nodes that join
do not count as restarts, and leave none.

Tasks and results are JSON. A collective of torch.distributed would not do: Ctrl-C does not end one,
it gives up after minutes while a rank may build for hours, gloo and NCCL need the right network
interface, and objects travel as pickles.
"""

import json
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from movekd.distributed import Rank, num_restarts
from movekd.errors import CacheError, MovekdError, shorten

POLL_S = 0.2
"""How often a rank that waits looks into the store."""
BEAT_S = 1.0
"""How often a rank shows that it lives, and looks whether another one has failed."""
LOST_S = 300.0
"""A rank that shows nothing for so long is lost; torchrun sees only those of the same node."""
GRACE_S = 5.0
"""How long a rank waits after another one failed. Torchrun ends it in that time, unless the other
one ran on another node; so the failed rank prints its error and no other one does."""


class RankStore:
    """The store, as one rank sees it; a context manager that tells the others if this one fails.

    Args:
        rank: this process.
        store: the key-value store. Default: that of torchrun.

    Raises:
        CacheError: in all methods, if the store is gone.
    """

    def __init__(self, rank: Rank, store: Any = None) -> None:
        self.rank, self._store = rank, store
        self._root = f"movekd-build/{num_restarts()}"
        self._session = uuid.uuid4().hex if rank.index == 0 else ""
        self._done: dict[str, int] = {}
        self._others = [0] if rank.index else list(range(1, rank.world_size))
        self._states: dict[int, tuple[bytes, float]] = {}  # rank -> its last one, since when
        self._next_check, self._has_stopped, self._is_finished = 0.0, threading.Event(), False
        self._beats = threading.Thread(target=self._beat, name="movekd-rank", daemon=True)

    def __enter__(self) -> Self:
        if self._store is None:
            from torch.distributed.rendezvous import rendezvous

            try:
                self._store, *_ = next(rendezvous("env://"))
            except RuntimeError as error:
                raise self._lost(error) from None
        if self.rank.index == 0:
            self._set(self._root, self._session)
            self._beats.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._stop_beats()
        if error is not None and self._session and not self._is_finished:
            with suppress(CacheError):  # without a store all ranks end by themselves
                if not self._has("failed"):
                    self._set(self._key("failed"), f"{self.rank}: {_sentence(error)}")

    def send(self, tasks: Sequence[Any]) -> None:
        """Give every other rank its task as JSON; ``tasks[0]`` belongs to rank 0."""
        for index in self._others:
            while not self._has("hello", index):
                self.check()
                time.sleep(POLL_S)
            name = self._get("hello", index).decode()
            self._set(self._key("task", name), json.dumps(tasks[index]))

    def receive(self) -> Any:
        """Return the task of this rank, once rank 0 has sent it."""
        name = uuid.uuid4().hex
        while True:
            session = self._newest_session()
            if session != self._session:  # else that of an earlier start, if nobody answers
                self._session = session
                self._set(self._key("hello", self.rank.index), name)
            if session:
                if self._has("task", name):
                    break
                self.check()
            time.sleep(POLL_S)
        self._beats.start()
        return json.loads(self._get("task", name))

    def report(self, label: str, done: int) -> None:
        """Note how many rows this rank has done, for the next beat; see ``check``."""
        self._done[label] = done
        self.check()

    def finish(self, result: Any) -> None:
        """Tell rank 0 what the task returned; this rank needs the store no more."""
        self._stop_beats()
        self._set_state(-1)
        self._set(self._key("result", self.rank.index), json.dumps(result))
        self._is_finished = True

    def results(self) -> list[Any] | None:
        """Return what the other ranks' tasks returned, in order; None before all have ended."""
        self.check()
        if not all(self._has("result", index) for index in self._others):
            return None
        for index in self._others:
            self._look_at(index)
        return [json.loads(self._get("result", index)) for index in self._others]

    def done_by_others(self, label: str) -> int:
        """Return how many rows the other ranks had done at the last look."""
        return sum(json.loads(state)[1].get(label, 0) for state, _ in self._states.values())

    def check(self) -> None:
        """Look at the other ranks; does nothing within a second of the last look.

        Raises:
            CacheError: one has failed or is lost.
        """
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + BEAT_S
        if self._has("failed"):
            time.sleep(GRACE_S)
            raise CacheError(
                f"{self._get('failed').decode()} What is sealed is safe: run the same command "
                "again to resume."
            )
        for index in self._others:
            self._look_at(index)

    def _look_at(self, index: int) -> None:
        now = time.monotonic()
        state = self._get("state", index) if self._has("state", index) else b"[0, {}]"
        last, since = self._states.get(index, (b"", now))
        if state != last:
            self._states[index] = state, now
        elif now - since > LOST_S and not self._has("result", index):
            raise CacheError(
                f"rank {index} has shown no sign of life for {now - since:.0f} s; expected one "
                "every second. Its node may be lost, or its process stopped. Run the same command "
                "again to resume."
            )

    def _beat(self) -> None:
        count = 0
        while not self._has_stopped.wait(BEAT_S):
            count += 1
            try:
                self._set_state(count)
            except CacheError:  # the main thread finds the same in ``check``
                return

    def _set_state(self, count: int) -> None:
        state = json.dumps([count, dict(self._done)])
        self._set(self._key("state", self.rank.index), state)

    def _stop_beats(self) -> None:
        self._has_stopped.set()
        if self._beats.is_alive():
            self._beats.join()

    def _newest_session(self) -> str:
        try:
            return self._store.get(self._root).decode() if self._store.check([self._root]) else ""
        except RuntimeError as error:
            raise self._lost(error) from None

    def _has(self, what: str, of: object = "") -> bool:
        try:
            return bool(self._store.check([self._key(what, of)]))
        except RuntimeError as error:
            raise self._lost(error) from None

    def _get(self, what: str, of: object = "") -> bytes:
        try:
            found: bytes = self._store.get(self._key(what, of))
            return found
        except RuntimeError as error:
            raise self._lost(error) from None

    def _set(self, key: str, value: str | bytes) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise self._lost(error) from None

    def _key(self, what: str, of: object = "") -> str:
        return f"{self._root}/{self._session}/{what}/{of}"

    def _lost(self, error: RuntimeError) -> CacheError:
        return CacheError(
            f"{self.rank} does not reach torchrun's store ({_first_line(error)}); expected "
            "torchrun and rank 0 to run until the end. Run the same command again to resume."
        )


def _sentence(error: BaseException) -> str:
    if isinstance(error, MovekdError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted."
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return shorten((str(error).strip() or "no message").splitlines()[0], 300)
