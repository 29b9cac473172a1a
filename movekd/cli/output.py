"""Print tables, JSON and progress: bars on a terminal, plain lines elsewhere.

Results go to standard output, all else to standard error. ``-q`` and ``-v`` change only the latter.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import typer

from movekd import distributed
from movekd.errors import printable

Progress = Callable[[str, int, int], None]
_PLAIN_EVERY_S = 10.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_verbosity = 0


def set_verbosity(level: int) -> None:
    """Set the verbosity: -1 hides progress, 0 is the default, 1 also shows library logs."""
    global _verbosity
    _verbosity = level


def is_quiet() -> bool:
    """Return whether ``-q`` was given."""
    return _verbosity < 0


def is_verbose() -> bool:
    """Return whether ``-v`` was given."""
    return _verbosity > 0


def quiet_libraries() -> None:
    """Hide the messages of transformers if ``-v`` was not given."""
    from movekd.student import hf_loading

    if not is_verbose():
        hf_loading.quiet_libraries()


def say(*lines: object, err: bool = False) -> None:
    """Print lines without what a terminal would obey: names of files and of teachers hold any."""
    typer.echo("\n".join(map(printable, lines)), err=err)


def print_text(text: str) -> None:
    """Print what a model wrote: line breaks, tabs and every letter stay."""
    typer.echo(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print a value, records (dataclasses) included, as JSON; without indent, on one line."""

    def encode(found: Any) -> Any:
        is_record = is_dataclass(found) and not isinstance(found, type)
        return asdict(found) if is_record else str(found)

    text = json.dumps(value, indent=indent, default=encode, ensure_ascii=indent is not None)
    typer.echo(re.sub(r"[^ -~\n]", _escape, text))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; columns of numbers are aligned right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for at, column in enumerate(columns):
        is_number = bool(rows) and all(_looks_numeric(row[at]) for row in rows)
        table.add_column(escape(_cell(column)), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*[escape(_cell(cell)) for cell in row])
    console = Console(width=None if sys.stdout.isatty() else 120)
    # a title of rich's table would wrap
    console.print(escape(printable(title)), style="bold", soft_wrap=True)
    console.print(table)


def size(num_bytes: float | None) -> str:
    """Return a number of bytes with its unit, in powers of ten; a dash for None."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(num_bytes) < 1000 or unit == "PB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def percent(share: float | None) -> str:
    """Return a fraction in percent, a dash for None."""
    return "-" if share is None else f"{share:.3%}"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a function (label, done, total) that shows progress on standard error.

    Only rank 0 shows it; with ``-q`` no process does.
    """
    if _verbosity < 0 or not distributed.is_main_process():
        yield lambda what, done, total: None
        return
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        *(rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()),
        *(rich.TextColumn("{task.fields[rate]}"), rich.TimeRemainingColumn()),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, tuple[rich.TaskID, float]] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, rate=""), time.monotonic()
            task, started = tasks[what]
            rate = f"{done / max(time.monotonic() - started, 1e-6):,.1f}/s"
            bars.update(task, completed=done, total=total, rate=rate)

        yield show


def _plain_progress() -> Progress:
    """Return a progress function that prints a line every ten seconds."""
    printed: dict[str, tuple[float, float]] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        started, last = printed.setdefault(what, (now, now))
        if now - last >= _PLAIN_EVERY_S or (done == total and now - started > 2):
            rate = done / max(now - started, 1e-6)
            left = (total - done) / max(rate, 1e-6)
            say(f"{what}: {done}/{total}, {rate:,.1f}/s, {left:,.0f} s left", err=True)
            printed[what] = (started, now)

    return show


def _cell(value: Any) -> str:
    """Return the text of a cell, whose lines stay apart."""
    return "\n".join(map(printable, str(value).split("\n")))


def _escape(found: re.Match[str]) -> str:
    """Return a character of JSON, escaped if a terminal would obey it or cannot show it."""
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def _looks_numeric(cell: Any) -> bool:
    return str(cell)[:1].isdigit() or str(cell) in ("-", "")
