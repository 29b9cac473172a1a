"""Lock a file through the kernel, which frees the lock of a process that dies.

Input: the path of a lock file. Output: a context that holds it. The file names its holder, and goes
when the holder ends.
"""

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from movekd.errors import ConfigError, MovekdError

TELL_AFTER_S = 1.0
"""How long a process waits for a lock before it says so."""

Refusal = Callable[[str], MovekdError]
"""Makes the error about a lock that another process holds, from who holds it."""


def holder() -> str:
    """Return who this process is: ``pid 123 on HOST``."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


@contextmanager
def hold_lock(
    path: Path,
    refusal: Refusal,
    *,
    error: type[MovekdError] = ConfigError,
    wait: bool = False,
    waiting: Callable[[str], None] = lambda holder: None,
    who: str = "",
) -> Iterator[None]:
    """Hold ``path``; delete it at the end. Takes over the file of a dead holder.

    Args:
        path: the lock file; missing folders are made.
        refusal: makes the error if another process holds the lock.
        error: class of the error if the file cannot be made or locked.
        wait: wait for another holder instead of raising.
        waiting: called once with who holds it, after waiting for ``TELL_AFTER_S``.
        who: written before this process, for processes that are refused.

    Raises:
        MovekdError: another process holds it, or the file cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as reason:
            raise error(
                f"{path} cannot be made: {reason.strerror}; expected a folder that can be written "
                "to, with room in it."
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                _wait(descriptor, waiting)
            try:
                if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(descriptor)  # the last holder has just removed this file
        except BlockingIOError:
            found = _holder(descriptor)
            os.close(descriptor)
            raise refusal(found) from None
        except OSError as reason:
            os.close(descriptor)
            raise error(f"{path} cannot be locked: {reason.strerror}.") from None
    _open_locks.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # only a note for people; the work reports a full disk
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{who}{holder()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # the lock ends below; the next holder takes the file
            path.unlink(missing_ok=True)
        _open_locks.discard(descriptor)
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Return whether a process holds ``path`` now; a file that a dead one left is not held."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no such file: nobody holds it
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until it is closed, below
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _wait(descriptor: int, waiting: Callable[[str], None]) -> None:
    """Lock a file that another process holds, and say so if that takes long."""
    timer = threading.Timer(TELL_AFTER_S, lambda: waiting(_holder(descriptor)))
    timer.daemon = True
    timer.start()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        timer.cancel()


def _holder(descriptor: int) -> str:
    """Return who wrote the lock file."""
    return os.pread(descriptor, 4096, 0).decode(errors="replace") or "another process"


_open_locks: set[int] = set()


def _close_in_child() -> None:
    """Close the locks in a forked child: it must not hold one after its parent was killed."""
    while _open_locks:
        os.close(_open_locks.pop())


os.register_at_fork(after_in_child=_close_in_child)
