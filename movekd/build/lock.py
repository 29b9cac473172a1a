"""One build a teacher and cache at a time: two writers in a Zarr shard lose data."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from movekd.errors import CacheError


@contextmanager
def build_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``path`` as a lock file; it goes away at the end.

    Args:
        path: the file. Its folder is made.
        wait: wait for another holder instead of refusing.

    The kernel drops the lock of a process that dies, so a stale file is simply taken over.

    Raises:
        CacheError: another build holds it; says which process on which host.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            holder = os.read(descriptor, 4096).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise CacheError(
                f"another build of this teacher is running ({holder}); wait for it, or stop it "
                "and run this command again."
            ) from None
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break  # not the file that the last holder has just removed
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
