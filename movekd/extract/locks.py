"""Who may do what to a teacher's features at the same time: the locks of builds.

    clip.seals/.lock                 a whole build, from beginning to end; a part of one while it
                                     settles what holds for all parts
    clip.seals/.settle.lock          a part, waiting for other parts that settle
    clip.seals/.calibrate.lock       whoever calibrates, waiting for whoever does
    clip.seals/.part-3-of-16.lock    a part, from its first settling to its end
    clip.seals/.00007.lock           whoever writes and seals Zarr shard 7, waiting for whoever does

A whole build is refused beside any other; a part beside a whole build, beside itself, and beside
parts of another number. The lock of a Zarr shard holds whatever else goes wrong: a worker of a
cluster can outlive the build that started it, or be given up for dead and live.

All are ``extract.lock``'s, so that a dead holder's are free. The next to take one removes it; those
that nobody need take again, ``remove_dead`` does.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from movekd.cache import layout
from movekd.cache.storage import Storage
from movekd.errors import CacheError
from movekd.extract.lock import build_lock
from movekd.extract.partition import Partition

_PART = re.compile(r"(\.part-\d+-of-(\d+)\.lock)(\.\d+)?")
_WRITER = re.compile(r"(\.\d+\.lock)(\.\d+)?")
_SETTLED = re.compile(r"(\.(?:calibrate|settle)\.lock)(\.\d+)?")
_SETTLE, _CALIBRATE = ".settle.lock", ".calibrate.lock"
_AT_ONCE = 32
"""Locks looked at together: in an object store a dead holder's takes a minute of watching."""


class BuildLocks:
    """What one build holds of its teachers; use it as a context manager.

    Args:
        storage: the cache.
        teachers: names of the teachers.
        partition: which part of the build this is; None for a whole one.

    Raises:
        CacheError: another build is in the way; says which process on which host.
    """

    def __init__(
        self, storage: Storage, teachers: Sequence[str], partition: Partition | None
    ) -> None:
        # in one order whatever the command line's: two parts would wait for each other
        self._storage, self._teachers = storage, sorted(teachers)
        self._partition = partition
        self._held = contextlib.ExitStack()
        self._has_arrived = False

    def __enter__(self) -> "BuildLocks":
        with contextlib.ExitStack() as held:
            if self._partition is None:
                for teacher in self._teachers:
                    held.enter_context(build_lock(self._storage, lock_name(teacher)))
                for teacher in self._teachers:
                    _refuse_parts(self._storage, teacher)
                    wait_for_writers(self._storage, teacher)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Be the only one who changes what holds for all Zarr shards: calibration, lengths."""
        if self._partition is None:
            yield
            return
        with contextlib.ExitStack() as now:
            for teacher in self._teachers:
                waiting = f"{layout.seals_name(teacher)}/{_SETTLE}"
                now.enter_context(build_lock(self._storage, waiting, wait=True))
                # later on a whole build can only be about to be refused
                own = lock_name(teacher)
                now.enter_context(build_lock(self._storage, own, wait=self._has_arrived))
            if not self._has_arrived:
                for teacher in self._teachers:
                    self._arrive(teacher, self._partition)
                self._has_arrived = True
            yield

    def _arrive(self, teacher: str, partition: Partition) -> None:
        _refuse_parts(self._storage, teacher, beside=partition.count)
        name = f".part-{partition.index}-of-{partition.count}.lock"
        self._held.enter_context(
            build_lock(
                self._storage, f"{layout.seals_name(teacher)}/{name}", who=f"part {partition}, "
            )
        )

    def remove_dead(self, teacher: str) -> None:
        """Remove locks of killed builds that no build will take again; called while settling.

        A calibration that is sealed and a Zarr shard that is sealed are left alone from then on,
        and with them the locks of whoever died between sealing and letting go. Locks that a living
        process holds stay.
        """
        # a part holds .settle.lock itself, and removes it when it lets go
        own = None if self._partition is None else _SETTLE
        names = [name for name in _named(self._storage, teacher, _SETTLED) if name != own]
        for name in _named(self._storage, teacher, _WRITER):
            shard = int(name.strip(".").partition(".")[0])
            if self._storage.exists(layout.seal_name(teacher, shard)):
                names.append(name)
        with ThreadPoolExecutor(_AT_ONCE, "movekd-locks") as pool:
            for _ in pool.map(lambda name: _is_held(self._storage, teacher, name), names):
                pass

    def is_alone(self, teacher: str) -> bool:
        """Return whether no other part is running; asked while settling."""
        if self._partition is None:
            return True
        own = f".part-{self._partition.index}-of-{self._partition.count}.lock"
        others = [name for name, _ in _parts(self._storage, teacher) if name != own]
        return not any(_is_held(self._storage, teacher, name) for name in others)


@contextlib.contextmanager
def writing(storage: Storage, teacher: str, shard: int) -> Iterator[None]:
    """Be the only one who writes a Zarr shard; wait for another one who does."""
    with build_lock(storage, f"{layout.seals_name(teacher)}/.{shard:05d}.lock", wait=True):
        yield


@contextlib.contextmanager
def calibrating(storage: Storage, teacher: str) -> Iterator[None]:
    """Be the only one who calibrates a teacher; wait for another one who does."""
    with build_lock(storage, f"{layout.seals_name(teacher)}/{_CALIBRATE}", wait=True):
        yield


def wait_for_writers(storage: Storage, teacher: str) -> None:
    """Return when whoever wrote a Zarr shard a moment ago has finished it, or died."""
    _pass_through(storage, teacher, _named(storage, teacher, _WRITER), wait=True)


def lock_name(teacher: str) -> str:
    """Return the lock of a whole build."""
    return f"{layout.seals_name(teacher)}/.lock"


def _refuse_parts(storage: Storage, teacher: str, beside: int | None = None) -> None:
    """Refuse to go on beside living parts of a build, except those of ``beside`` parts."""
    others = [name for name, count in _parts(storage, teacher) if count != beside]
    _pass_through(storage, teacher, others, wait=False)


def _parts(storage: Storage, teacher: str) -> list[tuple[str, int]]:
    """Return the locks of parts, living or dead, and of how many parts each is one."""
    names = _named(storage, teacher, _PART)
    return [(name, int(found[2])) for name in names if (found := _PART.fullmatch(name))]


def _named(storage: Storage, teacher: str, pattern: re.Pattern[str]) -> list[str]:
    """Return the locks of a kind; in an object store several numbered objects are one."""
    names = (name.rpartition("/")[2] for name in storage.files(layout.seals_name(teacher)))
    return sorted({found[1] for name in names if (found := pattern.fullmatch(name))})


def _pass_through(storage: Storage, teacher: str, names: Sequence[str], *, wait: bool) -> None:
    """Take and let go of locks, which removes those of the dead. Raises where one is held."""
    with ThreadPoolExecutor(_AT_ONCE, "movekd-locks") as pool:
        for _ in pool.map(lambda name: _take(storage, teacher, name, wait), names):
            pass


def _is_held(storage: Storage, teacher: str, name: str) -> bool:
    """Return whether a living process holds a lock; that of a dead one is removed."""
    with contextlib.suppress(CacheError):
        _take(storage, teacher, name, wait=False)
        return False
    return True


def _take(storage: Storage, teacher: str, name: str, wait: bool) -> None:
    """Take a lock and let go of it."""
    with build_lock(storage, f"{layout.seals_name(teacher)}/{name}", wait=wait):
        pass
