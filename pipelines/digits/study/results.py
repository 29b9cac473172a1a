"""The committed files of rows: one JSON object a line, appended to and never edited.

    runs.jsonl         a row a run, with its accuracy on validation scenes
    curves.jsonl       what it logged; and, of the first seed, what its routers did
    final.jsonl        a row a run, with its accuracy on test scenes: by the final pass
    exploratory.jsonl  a row an exploratory run, validation scenes alone

Beside them ``report.json``, which ``summary`` makes from them.

A line that an interruption cut short is dropped when the file is read, and overwritten by the
next one.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from study.plan import RunId

Row = dict[str, Any]
Name = Literal["runs", "curves", "final", "exploratory"]

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "study"


def read(folder: Path, name: Name) -> list[Row]:
    """Return the rows of a file; none where there is no file."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # the last ends with a newline, or was cut


def append(folder: Path, name: Name, row: Row) -> None:
    """Add a row, and wait until it is on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run_id(row: Row) -> RunId:
    """Return which run a row is of."""
    return RunId(row["seed"], row["world"], row["arm"])


def by_run(rows: Iterable[Row]) -> dict[RunId, Row]:
    """Return rows by their run; of several the last."""
    return {run_id(row): row for row in rows}
