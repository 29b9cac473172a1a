"""Whatever ends a command early is one printable line and an exit code; a bug is called one."""

import errno
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import httpx
import pytest
import torch
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from movekd.cli import doctor, main
from movekd.cli.failures import BUG, INTERRUPTED, NOT_STARTED, explain, one_line, run_guarded
from movekd.errors import CacheError, ConfigError


def run_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run a command that raises; return its exit code."""

    def command() -> None:
        raise error

    app = typer.Typer(callback=main.options)
    app.command("fail")(command)
    app.command("other")(doctor.doctor)
    monkeypatch.setattr(main, "app", app)
    monkeypatch.setattr(sys, "argv", ["movekd", "fail", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


BUGS = [
    *(KeyError("x"), TypeError("a\x1b[31m\nb"), ValueError("x" * 10**5), RuntimeError()),
    *(
        AssertionError(),
        RecursionError("too deep"),
        EOFError("Ran out of input"),
        ZeroDivisionError(),
    ),
]


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_a_bug_is_one_line_that_names_the_file_with_its_traceback(
    error, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for number in (1, 2):
        assert run_with(error, monkeypatch) == BUG
        line = capsys.readouterr().err.strip()
        assert line.isprintable()
        assert len(line) < 2000
        assert line.startswith(f"movekd: {type(error).__name__}")
        logs = list(tmp_path.glob("movekd-*.log"))
        assert len(logs) == number  # no file is written over
        log = Path(re.search(r"Its traceback is in (\S+\.log)\.", line)[1])
        assert log in logs
        assert f"\n{type(error).__name__}" in log.read_text()
        assert "in command" in log.read_text()
    assert run_with(error, monkeypatch, "--debug") == BUG
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert all(map(str.isprintable, told.splitlines()))


def test_a_bug_is_told_where_no_log_can_be_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert run_with(KeyError("x"), monkeypatch) == BUG
    assert "traceback could not be written (No such file" in capsys.readouterr().err


def full_disk() -> list[Exception]:
    """Return what the libraries raise on a full disk."""
    found: list[Exception] = [
        # not tried here: it would rename its file to /dev/full
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    ]
    weights = {"a": torch.zeros(10)}
    for write in (
        lambda: torch.save(weights, "/dev/full"),
        lambda: Path("/dev/full").write_text("x" * 10**6),
    ):
        try:
            write()
        except Exception as error:
            found.append(error)
    return found


SENTENCES = [
    (ConfigError("found a, expected b.\nDo c."), "found a, expected b. Do c."),
    (CacheError("\x1b[2Jx"), r"\\x1b\[2Jx"),
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: no space is left"),
    (
        OSError("[Errno 28] Error writing bytes. Detail: No space left on device"),
        "no space is left",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied. Check"),
    (
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        "request over the network failed.*refu",
    ),
    (TimeoutError("timed out"), r"request over the network failed \(timed out\)"),
    (httpx.ConnectError("[Errno -2] Name or service not known"), "network failed .*not known"),
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory.*smaller batch size"),
]


@pytest.mark.parametrize(("error", "said"), SENTENCES, ids=lambda part: type(part).__name__)
def test_what_a_user_can_mend_is_a_sentence(error, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_with(error, monkeypatch) == NOT_STARTED
    line = capsys.readouterr().err.strip()
    assert re.search(said, line)
    assert line.isprintable()
    assert not list(tmp_path.iterdir())
    assert run_with(error, monkeypatch, "--debug") == NOT_STARTED
    assert "Traceback" in capsys.readouterr().err


def test_libraries_on_a_full_disk_are_understood():
    errors = full_disk()
    assert len(errors) == 3
    for error in errors:
        assert re.search("no space is left|could not be written", explain(error) or ""), error


def test_the_last_line_of_a_workers_traceback_is_shown():
    try:
        raise OSError("inside")
    except OSError:
        inner = traceback.format_exc()
    found = explain(OSError(f"Caught OSError in DataLoader worker process 0.\n{inner}"))
    assert found == "OSError: inside. Check the path, its rights and the disk."


def test_ctrl_c_is_no_bug(monkeypatch, capsys):
    assert run_with(KeyboardInterrupt(), monkeypatch) == INTERRUPTED
    assert capsys.readouterr().err.strip().startswith("movekd: interrupted")


@given(st.text(min_size=1, max_size=20), st.sampled_from([1, 40, 200]))
@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@example("文", 3000)
@example("\x1b\n\udc80", 3000)
def test_a_line_is_printable_and_less_than_2_kb(text, times):
    line = one_line(text * times)
    assert line.isprintable()
    assert len(line.encode()) < 2000
    assert one_line("ab") == "ab"


def test_a_reader_that_goes_and_a_full_output_are_no_bugs():
    """`movekd --help | head -0`, and `movekd --help > /dev/full`."""
    command = [sys.executable, "-m", "movekd", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == NOT_STARTED
    assert done.stderr.startswith(b"movekd: no space is left")


def test_a_name_that_is_no_text_can_be_printed(monkeypatch, tmp_path):
    with (tmp_path / "printed").open("w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        run_guarded(lambda: typer.echo(os.fsdecode(b"image\xff.png")))
    assert (tmp_path / "printed").read_text() == "image\\udcff.png\n"
