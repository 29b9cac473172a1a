"""One lock, and the locks of builds: none of a killed build stays once the teacher is whole."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from builds import build
from movekd.cache.storage import open_storage
from movekd.errors import CacheError
from movekd.extract.locks import BuildLocks, build_lock
from movekd.extract.partition import WHOLE, Partition

LEFT = (
    ".lock", ".calibration.lock", ".00001.lock", ".part-0-of-1.lock", ".part-1-of-2.lock"
)  # fmt: skip
"""Every kind of lock that a teacher has."""
WHOLE_OR_PARTS = {"whole": [WHOLE], "parts": [Partition(0, 2), Partition(1, 2)]}


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path, monkeypatch) -> str:
    """Where a cache is to be; in an object store a dead holder is one that is watched in vain."""
    if request.param == "folder":
        return str(tmp_path / "cache")
    monkeypatch.setattr("movekd.extract.locks.RENEW_S", 0.02)
    monkeypatch.setattr("movekd.extract.locks.STALE_S", 0.1)
    return f"memory://{tmp_path.name}/cache"


def leave(place: str, name: str) -> None:
    """Put a lock whose holder is dead."""
    mark = json.dumps({"holder": "pid 1 on elsewhere", "token": "dead", "renewed": 3}).encode()
    open_storage(place).write(f"{name}.4" if "://" in place else name, [mark])


def content(place: str) -> dict[str, bytes]:
    storage = open_storage(place)
    return {name: storage.read(name) for name in storage.sizes()}


@pytest.mark.parametrize("sealed", ["nothing", "all but one", "everything"])
@pytest.mark.parametrize("partitions", WHOLE_OR_PARTS.values(), ids=WHOLE_OR_PARTS)
def test_the_next_build_removes_every_lock_of_the_dead(
    place, corpus_dir, tiny_specs, undisturbed, partitions, sealed
) -> None:
    storage = open_storage(place)
    if sealed != "nothing":
        for name, file in undisturbed.items():
            if sealed == "everything" or not name.endswith("clip.seals/00001.json"):
                storage.write(name, [file])
    for name in LEFT:
        leave(place, f"clip.seals/{name}")
    leave(place, ".lock")
    for partition in partitions:
        build(place, corpus_dir, tiny_specs, partition=partition)
    assert content(place) == undisturbed


HOLD = """
import sys
from movekd.extract.locks import build_lock
from movekd.cache.storage import open_storage
with build_lock(open_storage(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", [".calibration.lock", ".00001.lock"])
def test_the_lock_of_a_living_process_stays(
    tmp_path, corpus_dir, tiny_specs, undisturbed, name
) -> None:
    """As of a worker of a cluster that was given up, while a part of the build ends."""
    out = tmp_path / "undisturbed"
    lock = f"clip.seals/{name}"
    command = [sys.executable, "-c", HOLD, str(out), lock]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        locks = BuildLocks(open_storage(out), ["clip"])
        locks.remove_dead("clip")
        assert (out / lock).read_text().startswith(f"pid {holder.pid} on ")
        holder.kill()
        holder.wait()
        locks.remove_dead("clip")
        assert not (out / lock).exists()


def test_a_lock_is_kept_for_who_will_take_it(tmp_path, corpus_dir, tiny_specs, small_shards):
    """Of a Zarr shard without a seal, which another part may be about to write."""
    out = tmp_path / "cache"
    build(out, corpus_dir, tiny_specs[:1], partition=Partition(0, 2))
    leave(str(out), "clip.seals/.00001.lock")
    with BuildLocks(open_storage(out), ["clip"], Partition(0, 2)) as locks, locks.settling():
        locks.remove_dead("clip")
        assert (out / "clip.seals/.00001.lock").exists()


def test_every_lock_is_one_of_the_kinds_above(
    tmp_path, corpus_dir, tiny_specs, small_shards, monkeypatch
) -> None:
    """Whoever adds a kind of lock says here, and in ``remove_dead``, who removes it."""
    taken = set()

    @contextlib.contextmanager
    def noted(storage, name, **more):
        taken.add(name)
        yield

    monkeypatch.setattr("movekd.extract.locks.build_lock", noted)
    build(tmp_path / "whole", corpus_dir, tiny_specs[:1])
    build(tmp_path / "part", corpus_dir, tiny_specs[:1], partition=Partition(1, 2))
    kinds = {re.sub(r"\d+", "N", name) for name in taken}
    assert kinds == {".lock"} | {re.sub(r"\d+", "N", f"clip.seals/{name}") for name in LEFT}


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock until it is killed, or its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), "locks/.lock"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_build_is_refused_with_pid_and_host(tmp_path, holder) -> None:
    found = rf"\(pid {holder.pid} on {socket.gethostname()}\)"
    with (
        pytest.raises(CacheError, match=f"another build .* running {found}; wait"),
        build_lock(open_storage(tmp_path), "locks/.lock"),
    ):
        pass


def test_the_lock_of_a_killed_build_is_taken_over(tmp_path, holder) -> None:
    holder.kill()
    holder.wait()
    path = tmp_path / "locks" / ".lock"
    assert path.exists()
    with build_lock(open_storage(tmp_path), "locks/.lock"):
        assert path.read_text() == f"pid {os.getpid()} on {socket.gethostname()}"
    assert not path.exists()


HOLD_AND_FORK = """
import os, sys
from movekd.extract.locks import build_lock
from movekd.cache.storage import open_storage
with build_lock(open_storage(sys.argv[1]), "locks/.lock"):
    if os.fork() == 0:
        print("held", flush=True)  # by the parent: what a child inherits is let go by now
        os.read(0, 1)
        os._exit(0)
    sys.stdin.read()
"""


def test_a_killed_builds_children_do_not_hold_its_lock(tmp_path) -> None:
    command = [sys.executable, "-c", HOLD_AND_FORK, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with build_lock(open_storage(tmp_path), "locks/.lock"):  # its child lives on
            pass


def test_a_waiting_build_gets_the_lock_when_it_is_free(tmp_path, holder) -> None:
    holder.stdin.close()
    with build_lock(open_storage(tmp_path), "locks/.lock", wait=True):
        assert holder.wait() == 0


def test_who_waits_says_for_whom(place, monkeypatch, caplog) -> None:
    monkeypatch.setattr("movekd.files.lock.TELL_AFTER_S", 0.0)
    storage, told = open_storage(place), threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: told.set()
    logging.getLogger("movekd").addHandler(handler)
    with ThreadPoolExecutor(1) as pool:
        with build_lock(storage, ".lock"):
            waits = pool.submit(take, storage)
            assert told.wait(60)
        waits.result()
    logging.getLogger("movekd").removeHandler(handler)
    found = rf"waiting for .*/\.lock, .* \(pid {os.getpid()} on {socket.gethostname()}\)"
    assert [bool(re.match(found, record.getMessage())) for record in caplog.records] == [True]


def take(storage) -> None:
    with build_lock(storage, ".lock", wait=True):
        pass


def test_the_lock_goes_away_with_an_error(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), build_lock(open_storage(tmp_path), "a"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


TAKE_TURNS = """
import sys
from movekd.extract.locks import build_lock
from movekd.cache.storage import open_storage
from movekd.files import lock
lock.TELL_AFTER_S = 1e6  # a busy machine may take its time
for _ in range(100):
    with build_lock(open_storage(sys.argv[1]), "locks/.lock", wait=True):
        pass
"""


def test_many_who_take_turns_never_trip_over_a_removed_file(tmp_path) -> None:
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[1] for process in processes] == [""] * 4


def test_a_lock_that_cannot_be_made_is_a_sentence(tmp_path) -> None:
    (tmp_path / "locks").write_bytes(b"")
    with (
        pytest.raises(CacheError, match=r"locks/\.lock cannot be made: "),
        build_lock(open_storage(tmp_path), "locks/.lock"),
    ):
        pass
    (tmp_path / "folder" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(CacheError, match=r"folder/\.lock cannot be made: Is a directory"),
        build_lock(open_storage(tmp_path), "folder/.lock"),
    ):
        pass
