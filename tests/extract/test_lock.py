import os
import signal
import socket
import subprocess
import sys

import pytest

from movekd.cache.storage import open_storage
from movekd.errors import CacheError
from movekd.extract.lock import build_lock

HOLD = """
import sys
from movekd.extract.lock import build_lock
from movekd.cache.storage import open_storage
with build_lock(open_storage(sys.argv[1]), "locks/.lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock until it is killed, or its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
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
from movekd.extract.lock import build_lock
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


def test_the_lock_goes_away_with_an_error(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), build_lock(open_storage(tmp_path), "a"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


TAKE_TURNS = """
import sys
from movekd.extract.lock import build_lock
from movekd.cache.storage import open_storage
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
