"""Locks of builds: who may change a teacher's features at the same time.

    clip.seals/.part-0-of-1.lock     a build, from its beginning to its end; a whole build is the
                                     only part of one
    clip.seals/.lock                 a part that settles what holds for all parts; others wait
    clip.seals/.calibration.lock     the process that writes and seals the calibration
    clip.seals/.00007.lock           the process that writes and seals Zarr shard 7

A build is refused beside a part of another number and beside the same part. The locks of the last
two kinds hold whatever else goes wrong: a worker of a cluster can outlive the build that started
it, or live on after the build gave it up for dead.
"""

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath

from movekd.cache import layout
from movekd.cache.object_storage import ObjectStorage
from movekd.cache.storage import Storage
from movekd.errors import CacheError, shorten
from movekd.extract.partition import WHOLE, Partition
from movekd.files.lock import hold_lock, holder

RENEW_S = 15.0
"""How often a holder renews its object."""
STALE_S = 60.0
"""A holder that does not renew its object for so long is dead."""

_log = logging.getLogger("movekd")  # without a handler, Python prints warnings as plain lines
_PART = re.compile(r"(\.part-\d+-of-(\d+)\.lock)(\.\d+)?")
_SHARD = re.compile(r"(\.\d+\.lock)(\.\d+)?")
_SEALED = re.compile(r"(\.(?:\d+|calibration)\.lock)(\.\d+)?")
_AT_ONCE = 32
"""Locks checked in parallel: in an object store a dead holder's takes a minute of watching."""


class BuildLocks:
    """What one build holds of its teachers; use it as a context manager.

    Args:
        storage: the cache.
        teachers: names of the teachers.
        partition: which part of the build this is.

    Raises:
        CacheError: another build is in the way; names its process and host.
    """

    def __init__(
        self, storage: Storage, teachers: Sequence[str], partition: Partition = WHOLE
    ) -> None:
        # Sorted, because two parts that lock the teachers in other orders would deadlock.
        self._storage, self._teachers = storage, sorted(teachers)
        self._partition = partition
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "BuildLocks":
        storage, part = self._storage, self._partition
        who = "" if part == WHOLE else f"part {part}, "
        with contextlib.ExitStack() as held:
            # One arrival at a time: of two builds that exclude each other one must succeed.
            with build_lock(storage, ".lock", wait=True):
                for teacher in self._teachers:
                    others = [name for name, n in _parts(storage, teacher) if n != part.count]
                    _require_free(storage, teacher, others)
                    held.enter_context(build_lock(storage, part_lock(teacher, part), who=who))
            if part == WHOLE:
                for teacher in self._teachers:
                    wait_for_writers(storage, teacher)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Be the only part that changes what holds for all Zarr shards: calibration, lengths."""
        with contextlib.ExitStack() as held:
            for teacher in self._teachers:
                name = f"{layout.seals_name(teacher)}/.lock"
                held.enter_context(build_lock(self._storage, name, wait=True))
            yield

    def remove_dead(self, teacher: str) -> None:
        """Remove locks of killed processes that no build will take again; called while settling.

        Nobody writes what is sealed, so nobody takes its lock again. Locks that a living process
        holds stay.
        """
        storage, sealed = self._storage, []
        for lock in _named(storage, teacher, _SEALED):
            stem = lock.strip(".").partition(".")[0]  # the inverse of ``sealing``
            if storage.exists(f"{layout.seals_name(teacher)}/{stem}.json"):
                sealed.append(lock)
        _errors_of_held(storage, teacher, sealed)

    def is_only_part(self, teacher: str) -> bool:
        """Return whether no other part is running; asked while settling."""
        own = PurePosixPath(part_lock(teacher, self._partition)).name
        others = [name for name, _ in _parts(self._storage, teacher) if name != own]
        return not _errors_of_held(self._storage, teacher, others)


@contextmanager
def sealing(storage: Storage, seal: str) -> Iterator[None]:
    """Be the only one who writes what ``seal`` seals; wait for another one who does.

    Args:
        storage: the cache.
        seal: ``clip.seals/00007.json`` or ``clip.seals/calibration.json``.
    """
    path = PurePosixPath(seal)
    with build_lock(storage, f"{path.parent}/.{path.stem}.lock", wait=True):
        yield


def wait_for_writers(storage: Storage, teacher: str) -> None:
    """Return when the processes that are writing Zarr shards have finished them, or died."""
    _require_free(storage, teacher, _named(storage, teacher, _SHARD), wait=True)


def part_lock(teacher: str, partition: Partition = WHOLE) -> str:
    """Return the lock that a part of a build holds to its end."""
    name = f".part-{partition.index}-of-{partition.count}.lock"
    return f"{layout.seals_name(teacher)}/{name}"


def _parts(storage: Storage, teacher: str) -> list[tuple[str, int]]:
    """Return the locks of parts, living or dead, each with its number of parts."""
    names = _named(storage, teacher, _PART)
    return [(name, int(found[2])) for name in names if (found := _PART.fullmatch(name))]


def _named(storage: Storage, teacher: str, pattern: re.Pattern[str]) -> list[str]:
    """Return the locks of a kind; in an object store several numbered objects are one."""
    names = (name.rpartition("/")[2] for name in storage.files(layout.seals_name(teacher)))
    return sorted({found[1] for name in names if (found := pattern.fullmatch(name))})


def _require_free(
    storage: Storage, teacher: str, names: Sequence[str], *, wait: bool = False
) -> None:
    for error in _errors_of_held(storage, teacher, names, wait=wait):
        raise error


def _errors_of_held(
    storage: Storage, teacher: str, names: Sequence[str], *, wait: bool = False
) -> list[CacheError]:
    """Take and release locks, which removes those of the dead; return the errors of the others."""

    def take(name: str) -> CacheError | None:
        try:
            with build_lock(storage, f"{layout.seals_name(teacher)}/{name}", wait=wait):
                return None
        except CacheError as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE, "movekd-locks") as pool:
        return [error for error in pool.map(take, names) if error is not None]


@contextmanager
def build_lock(storage: Storage, name: str, *, wait: bool = False, who: str = "") -> Iterator[None]:
    """Hold a lock file of a cache and delete it at the end. Takes over the lock of a dead holder.

    Args:
        storage: the cache.
        name: the file.
        wait: wait for another holder instead of raising.
        who: shown before the process to builds that are refused.

    Raises:
        CacheError: another build holds it; names its process and host.
    """
    if storage.local_dir is not None:
        path = storage.local_dir / name
        with hold_lock(
            path,
            _held,
            error=CacheError,
            wait=wait,
            waiting=lambda found: _tell_waiting(storage, name, found),
            who=who,
        ):
            yield
    else:
        assert isinstance(storage, ObjectStorage)
        with _object_lock(storage, name, wait, who):
            yield


@contextmanager
def _object_lock(storage: ObjectStorage, name: str, wait: bool, who: str) -> Iterator[None]:
    """Hold ``name.N`` in an object store, N above that of every dead holder.

    Nobody deletes another's object to take the lock. A process that finds a dead holder creates
    the next number, and only one of several can.
    """
    content = {"holder": f"{who}{holder()}", "token": uuid.uuid4().hex, "renewed": 0}
    mark, dead = json.dumps(content).encode(), set[bytes]()
    has_told = False
    while True:
        found = _marks(storage, name)
        newest = max(found, default=-1)
        if found and found[newest] not in dead:
            seen = found[newest]
            if not _is_renewed(storage, f"{name}.{newest}", seen):
                dead.add(seen)
            elif not wait and newest in _marks(storage, name):  # renewed, not released
                raise _held(str(json.loads(seen)["holder"]))
            elif wait and not has_told and newest in _marks(storage, name):
                has_told = True
                _tell_waiting(storage, name, str(json.loads(seen)["holder"]))
            continue  # look again: it may have been released while we watched
        number = newest + 1
        if not storage.create(f"{name}.{number}", mark):
            continue
        others = _marks(storage, name)
        if others.pop(number, None) != mark:
            continue  # a store without exclusive creation let two in; the last one stays
        if dead.issuperset(others.values()):
            break
        storage.delete(f"{name}.{number}")  # another process started from an older listing
    for older in others:
        storage.delete(f"{name}.{older}")
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_S):
            content["renewed"] = int(str(content["renewed"])) + 1
            with contextlib.suppress(CacheError):  # the next renewal tries again
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
    """Return the lock objects of a name, number -> content.

    Holders are told apart by content: numbers start again when all objects are gone.
    """
    numbered = {key: key.removeprefix(f"{name}.") for key in storage.starting_with(f"{name}.")}
    contents = storage.read_many([key for key in numbered if numbered[key].isdigit()])
    return {int(numbered[key]): content for key, content in contents.items()}


def _is_renewed(storage: ObjectStorage, name: str, seen: bytes) -> bool:
    """Watch a lock object; return whether it changes or goes: then its holder was alive.

    Other machines' clocks and pids say nothing: containers share host names and numbers.
    """
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        threading.Event().wait(min(1.0, RENEW_S))
        if storage.read_many([name]).get(name) != seen:
            return True
    return False


def _tell_waiting(storage: Storage, name: str, holder: str) -> None:
    _log.warning(
        "waiting for %s/%s, which another build holds (%s). If that process is stopped, resume or "
        "end it.",
        *(storage.url, name, shorten(holder)),
    )


def _held(holder: str) -> CacheError:
    return CacheError(
        f"another build of this teacher is running ({holder}); wait for it, or stop it and run "
        "this command again."
    )
