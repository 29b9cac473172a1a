"""What every benchmark ends with: a table on the terminal and a JSON file in results/.

{"date": "2026-11-23", "machine": "...", "figures": {"flat name": number}}
"""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from movekd.cli.output import print_table

RESULTS = Path(__file__).resolve().parent / "results"


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
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print_table(
        f"{name}, {today}, {machine()}",
        ["figure", "value", "what it is"],
        [[key, f"{value:.4g}", notes.get(key, "")] for key, value in figures.items()],
    )
    RESULTS.mkdir(exist_ok=True)
    content = {"date": today, "machine": machine(), "figures": figures}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: benchmarks/results/{path.name}")


def interleaved_ratio(
    measured: Callable[[], object], against: Callable[[], object], pairs: int
) -> tuple[float, float, float]:
    """Return the median of time(measured) / time(against) over pairs, and its 95% interval.

    The two run by turns, because a shared machine's speed drifts. The interval is that of the
    median by order statistics (binomial).
    """
    ratios = []
    for _ in range(pairs):
        times = []
        for run in (measured, against):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    ratios.sort()
    half = 1.959964 * pairs**0.5 / 2
    low = max(int(pairs / 2 - half), 0)
    high = min(int(pairs / 2 + half + 1), pairs - 1)
    return statistics.median(ratios), ratios[low], ratios[high]
