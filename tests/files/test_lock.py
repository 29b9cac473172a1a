"""A lock has one holder, tells who it is, and goes with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from movekd.errors import ConfigError, TrainingError
from movekd.files.lock import hold_lock, holder, is_held

HOLD = """
import sys
from pathlib import Path
from movekd.errors import ConfigError
from movekd.files.lock import hold_lock
with hold_lock(Path(sys.argv[1]), ConfigError):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with (
        hold_lock(path, ConfigError),
        pytest.raises(TrainingError, match=holder()),
        hold_lock(path, TrainingError),
    ):
        pass
    assert not path.exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert is_held(path)
        with (
            pytest.raises(ConfigError, match=f"pid {process.pid} on"),
            hold_lock(path, ConfigError),
        ):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert path.exists()
    assert not is_held(path)
    with hold_lock(path, ConfigError):
        assert is_held(path)
    assert not path.exists()
    assert not is_held(path)
    assert not path.exists()  # looking makes no file


def test_a_linked_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(ConfigError, match="cannot be made"),
        hold_lock(tmp_path / ".lock", ConfigError),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_ends_although_its_file_cannot_be_removed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    before = len(os.listdir("/proc/self/fd"))
    with hold_lock(path, ConfigError):
        path.unlink()
        path.mkdir()
    assert len(os.listdir("/proc/self/fd")) == before
    path.rmdir()
    with hold_lock(path, ConfigError):
        pass
