"""A lock in a cache that goes away with whoever holds it.

On a file system the kernel keeps the lock and drops it with the process. An object store knows no
such thing: there the lock is an object that is made only if it does not exist yet, and renewed by
its holder as long as it lives. ``extract.locks`` says who holds which.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from movekd.cache.object_storage import ObjectStorage
from movekd.cache.storage import Storage
from movekd.errors import CacheError

RENEW_S = 15.0
"""How often a holder renews its object."""
STALE_S = 60.0
"""Without a renewal for so long, watched by who wants the lock, its holder is dead."""


@contextmanager
def build_lock(storage: Storage, name: str, *, wait: bool = False, who: str = "") -> Iterator[None]:
    """Hold a lock file of a cache; it goes away at the end. A dead build's is taken over.

    Args:
        storage: the cache.
        name: the file.
        wait: wait for another holder instead of refusing.
        who: what those who are refused read before the process.

    Raises:
        CacheError: another build holds it; says which process on which host.
    """
    if storage.local_dir is not None:
        with _file_lock(storage.local_dir / name, wait, who):
            yield
    else:
        assert isinstance(storage, ObjectStorage)
        with _object_lock(storage, name, wait, who):
            yield


@contextmanager
def _file_lock(path: Path, wait: bool, who: str) -> Iterator[None]:
    """Hold ``path`` through the kernel, which drops the lock of a process that dies."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CacheError(
                f"{path} cannot be made: {error.strerror}. A build needs a folder that it may "
                "write to, and room in it."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(descriptor)  # of the file that the last holder has just removed
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise _held(holder) from None
        except OSError as error:
            os.close(descriptor)
            raise CacheError(f"{path} cannot be locked: {error.strerror}.") from None
    _open_locks.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # a note for people; a full disk is told by the build
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{who}{_holder()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        _open_locks.discard(descriptor)
        os.close(descriptor)


_open_locks: set[int] = set()


def _let_go() -> None:
    """Close the locks in a forked child: a decoding process must not hold one after a kill."""
    while _open_locks:
        os.close(_open_locks.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def _object_lock(storage: ObjectStorage, name: str, wait: bool, who: str) -> Iterator[None]:
    """Hold ``name.N`` in an object store, N above that of every dead holder.

    Nobody deletes another's object to take the lock: who finds a dead holder makes the next
    number, and of several only one can.
    """
    content = {"holder": f"{who}{_holder()}", "token": uuid.uuid4().hex, "renewed": 0}
    mark, dead = json.dumps(content).encode(), set[bytes]()
    while True:
        found = _marks(storage, name)
        newest = max(found, default=-1)
        if found and found[newest] not in dead:
            seen = found[newest]
            if not _is_renewed(storage, f"{name}.{newest}", seen):
                dead.add(seen)
            elif not wait and newest in _marks(storage, name):  # renewed, not let go
                raise _held(str(json.loads(seen)["holder"]))
            continue  # look again: it may have been let go while we watched
        number = newest + 1
        if not storage.create(f"{name}.{number}", mark):
            continue
        others = _marks(storage, name)
        if others.pop(number, None) != mark:
            continue  # a store that knows no exclusive creation let two in; the last one stays
        if dead.issuperset(others.values()):
            break
        storage.delete(f"{name}.{number}")  # somebody began from a listing older than ours
    for older in others:
        storage.delete(f"{name}.{older}")
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_S):
            content["renewed"] = int(str(content["renewed"])) + 1
            with contextlib.suppress(CacheError):  # tried again at the next turn
                storage.write(f"{name}.{number}", [json.dumps(content).encode()])

    thread = threading.Thread(target=renew, name="movekd-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        storage.delete(f"{name}.{number}")


def _marks(storage: ObjectStorage, name: str) -> dict[int, bytes]:
    """Return the lock objects that there are, number -> content.

    Holders are told apart by content: numbers start again when all objects are gone.
    """
    numbered = {key: key.removeprefix(f"{name}.") for key in storage.starting_with(f"{name}.")}
    contents = storage.read_many([key for key in numbered if numbered[key].isdigit()])
    return {int(numbered[key]): content for key, content in contents.items()}


def _is_renewed(storage: ObjectStorage, name: str, seen: bytes) -> bool:
    """Watch a lock object; return whether it changes or goes, so that its holder was alive.

    No clock of another machine is trusted, and no pid: containers share host names and numbers.
    """
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        threading.Event().wait(min(1.0, RENEW_S))
        if storage.read_many([name]).get(name) != seen:
            return True
    return False


def _holder() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _held(holder: str) -> CacheError:
    return CacheError(
        f"another build of this teacher is running ({holder}); wait for it, or stop it and run "
        "this command again."
    )
