"""What every benchmark ends with: a table on the terminal and a JSON file in results/.

{"date": "2026-11-23", "machine": "...", "figures": {"flat name": number}}

A figure with a 95% interval is three numbers: ``name``, ``name_low`` and ``name_high``.
"""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from movekd.cli.output import print_table

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Figure:
    """One number, and what it should be."""

    name: str
    value: float
    what: str
    interval: tuple[float, float] | None = None
    """95% interval."""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The target as people read it."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def is_met(self) -> bool | None:
        """Whether the value meets its target; None without one."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    @property
    def flat(self) -> dict[str, float]:
        """What goes into the JSON file."""
        if self.interval is None:
            return {self.name: self.value}
        low, high = self.interval
        return {self.name: self.value, f"{self.name}_low": low, f"{self.name}_high": high}


def machine() -> str:
    """Return what the figures were measured on, without its name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores {platform.machine()}, {memory_gib:.0f} GiB, {device}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def write_results(name: str, figures: dict[str, float], notes: dict[str, str]) -> None:
    """Print the figures with a note each, and write them to results/NAME.json."""
    print_table(
        f"{name}, {_today()}, {machine()}",
        ["figure", "value", "what it is"],
        [[key, f"{value:.4g}", notes.get(key, "")] for key, value in figures.items()],
    )
    _write_json(name, figures)


def write_figures(name: str, figures: Sequence[Figure], is_complete: bool) -> None:
    """Print the figures with their targets; write results/NAME.json if these are all of them."""
    met = {True: "yes", False: "NO", None: ""}
    rows = [
        [
            figure.name,
            f"{figure.value:.4g}",
            "" if figure.interval is None else "{:.4g} to {:.4g}".format(*figure.interval),
            figure.target,
            met[figure.is_met],
        ]
        for figure in figures
    ]
    columns = ["figure", "value", "95% interval", "target", "met"]
    print_table(f"{name}, {_today()}, {machine()}", columns, rows)
    for figure in figures:
        print(f"{figure.name}: {figure.what}")
    if is_complete:
        _write_json(name, {key: value for figure in figures for key, value in figure.flat.items()})


def interleaved_ratio(
    measured: Callable[[], object],
    against: Callable[[], object],
    pairs: int,
    before: Callable[[], object] = lambda: None,
) -> tuple[float, float, float]:
    """Return the median of time(measured) / time(against) over pairs, and its 95% interval.

    The two run by turns, and every other pair in the other order, because a shared machine's
    speed drifts.

    Args:
        measured: what to time; where it returns a float, those seconds count instead.
        against: likewise.
        pairs: how many times.
        before: called before each of the two, untimed.
    """
    ratios = []
    for pair in range(pairs):
        seconds = {}
        for run in (measured, against) if pair % 2 == 0 else (against, measured):
            before()
            started = time.perf_counter()
            own = run()
            elapsed = time.perf_counter() - started
            seconds[run] = own if isinstance(own, float) else elapsed
        ratios.append(seconds[measured] / seconds[against])
    return median_interval(ratios)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95% interval, by order statistics (binomial)."""
    ordered, count = sorted(values), len(values)
    half = 1.959964 * count**0.5 / 2
    low = max(int(count / 2 - half), 0)
    high = min(int(count / 2 + half + 1), count - 1)
    return statistics.median(ordered), ordered[low], ordered[high]


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _write_json(name: str, figures: dict[str, float]) -> None:
    RESULTS.mkdir(exist_ok=True)
    content = {"date": _today(), "machine": machine(), "figures": figures}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: benchmarks/results/{path.name}")
