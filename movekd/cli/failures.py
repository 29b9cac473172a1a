"""Turn what ends a command early into a sentence and an exit code.

Input: an exception. Output: one line of at most 2 kB on standard error, and the code. Used by
``main``, and by scripts that call several commands in one process.
"""

import io
import os
import platform
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from movekd import __version__, distributed
from movekd.errors import MovekdError, printable, shorten

DONE, PROBLEMS, NOT_STARTED, BUG, INTERRUPTED, NO_READER = 0, 1, 2, 3, 130, 141
"""Exit codes. The last two are those of a program that SIGINT or SIGPIPE ends."""

_DISK_FULL = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
_WRITE_FAILED = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""What torch.save says, without the reason."""
_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NETWORK_MODULES = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub", "obstore")
_MAX_BYTES = 1900


def run_guarded(function: Callable[[], object]) -> None:
    """Call a function; if it fails, print one line and exit as the commands do.

    Raises:
        SystemExit: with the code of the failure.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        function()
        sys.stdout.flush()  # here, because Python ignores what fails at its exit
    except KeyboardInterrupt:
        exit_interrupted()
    except Exception as error:
        exit_after(error)


def exit_interrupted() -> NoReturn:
    """Print what a user can do after Ctrl-C, and exit."""
    fail(
        "interrupted. What is sealed or saved stays; run the same command again to resume "
        "(`train` with --resume, `cache build` without --overwrite).",
        INTERRUPTED,
    )


def exit_after(error: Exception) -> NoReturn:
    """Print one line about an error, and exit; with --debug raise it.

    An error that nobody foresaw is a bug: its traceback goes to a new file, which the line names.
    """
    if isinstance(error, BrokenPipeError) and _has_no_reader():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        sys.exit(NO_READER)
    if "--debug" in sys.argv:
        for line in "".join(traceback.format_exception(error)).splitlines():
            typer.echo(printable(line), err=True)
        sys.exit(BUG if explain(error) is None else NOT_STARTED)
    if (sentence := explain(error)) is not None:
        fail(sentence, NOT_STARTED)
    what = f"{type(error).__name__}: {_first_line(error)}"
    fail(
        f"{shorten(what, 600)} This is a bug in movekd, or in a library that it calls. "
        f"{_write_log(error)} Please report it with that file; --debug prints the traceback.",
        BUG,
    )


def explain(error: BaseException) -> str | None:
    """Return the sentence about an error that a user can mend; None if it is a bug."""
    if isinstance(error, MovekdError):
        return str(error)
    text = str(error)
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if any(sign in text for sign in _DISK_FULL):
        where = f"{file}: " if (file := getattr(error, "filename", None)) else ""
        return (
            f"{where}no space is left on the disk, or the quota is used up. Free some, or give "
            "another folder, and run the same command again."
        )
    if any(sign in text for sign in _WRITE_FAILED):
        return (
            f"a file could not be written ({_first_line(error)}); expected room on the disk and "
            "the right to write there. Look at both, and run the same command again."
        )
    if isinstance(error, ConnectionError | TimeoutError) or kinds & {*_NETWORK_MODULES}:
        return (
            f"a request over the network failed ({_first_line(error)}); expected an answer. Look "
            "at the network and the address, or give a local directory, and run the same command "
            "again."
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        why = error.strerror or _first_line(error)
        return f"{where}{why}. Check the path, its rights and the disk."
    is_memory = type(error).__name__ == "OutOfMemoryError" or any(m in text for m in _MEMORY)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_memory):
        return (
            f"the device is out of memory: {_first_line(error)} Give a smaller batch size, or free "
            "the device. A teacher keeps the batch size that its calibration settled; build it "
            "again with --overwrite to change that."
        )
    return None


def fail(sentence: str, code: int) -> NoReturn:
    """Print one line on standard error, and exit; of several processes only one prints."""
    if distributed.should_print(sentence):
        typer.echo(f"movekd: {one_line(sentence)}", err=True)
    sys.exit(code)


def one_line(text: object) -> str:
    """Return a text as one printable line of less than 2 kB."""
    line = shorten(text, _MAX_BYTES)
    if len(line.encode()) > _MAX_BYTES + 40:  # letters of several bytes
        line = shorten(text, _MAX_BYTES // 4)
    return line


def _first_line(error: BaseException) -> str:
    """Return what an error says: its first line, or its last behind a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    is_from_worker = any("Traceback (most recent call last)" in line for line in lines)
    return shorten(lines[-1] if is_from_worker else lines[0], 400)


def _has_no_reader() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # standard output is no file
        return False


def _write_log(error: Exception) -> str:
    """Write the traceback to a new file; return a sentence that says where."""
    lines = [
        f"movekd {__version__}, Python {platform.python_version()}, {platform.platform()}\n",
        f"{sys.argv}\n",
        *traceback.format_exception(error),
    ]
    try:
        descriptor, path = tempfile.mkstemp(prefix="movekd-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError as reason:
        return f"Its traceback could not be written ({reason.strerror})."
    return f"Its traceback is in {path}."
