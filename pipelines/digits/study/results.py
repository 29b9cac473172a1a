"""Read and append to the committed files of rows; a line is a JSON object and is never edited.

    runs.jsonl         per run: accuracy on validation scenes
    curves.jsonl       per run: logged curves; of the first seed also the routers' choices
    final.jsonl        per run: accuracy on test scenes, answered once
    exploratory.jsonl  per exploratory run: accuracy on validation scenes

``summary`` makes ``report.json`` from them.

A line that an interruption cut short is ignored by readers and overwritten by the next row.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from study.plan import RunId

Row = dict[str, Any]
Name = Literal["runs", "curves", "final", "exploratory", "afterwards"]

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "study"
"""Rows of the first study."""
CODEC_RESULTS = RESULTS.with_name("codecs")
TWELVE_RESULTS = RESULTS.with_name("twelve")


def read(folder: Path, name: Name) -> list[Row]:
    """Return the rows of a file; an empty list without the file."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [
        json.loads(line) for line in lines[:-1]
    ]  # after the last newline: nothing, or a cut line


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
    """Return the run of a row."""
    return RunId(row["seed"], row["world"], row["arm"])


def by_run(rows: Iterable[Row]) -> dict[RunId, Row]:
    """Return the last row of each run."""
    return {run_id(row): row for row in rows}
