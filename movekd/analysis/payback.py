"""When a cache has paid for itself against teachers in the loop: arithmetic of ``analysis.plan``.

Comes in: bytes, hours and rates. Goes out: what a training run reads, and a number of runs.
"""

import math
from dataclasses import dataclass
from typing import Any

from movekd.analysis.disk_benchmark import DiskRates


@dataclass(frozen=True)
class Runs:
    """The training runs that a cache is for.

    Attributes:
        images_per_s: what a run trains, teachers left out.
        epochs: how often a run sees every image.
    """

    images_per_s: float = 100.0
    epochs: float = 1.0


def break_even_runs(
    build_hours: float, forward_hours: float, excess_read_hours: float
) -> int | None:
    """Return after how many runs a cache has paid for itself; None is never.

    With teachers in the loop, a run of E epochs over N images pays their forward passes each
    time; with a cache it pays nothing of them, because reads run beside the training, save for
    what reading takes longer than training::

        forward = E N / teacher's images/s
        excess  = E N max(0, bytes of a row / read rate - 1 / training's images/s)
        runs    = ceil(build / (forward - excess)),  never if forward <= excess

    Args:
        build_hours: what the cache takes to build, once.
        forward_hours: ``forward`` of one run.
        excess_read_hours: ``excess`` of one run.
    """
    saved = forward_hours - excess_read_hours
    if saved <= 0:
        return None
    return max(1, math.ceil(build_hours / saved - 1e-9))  # 1.0000000001 runs are one


def run_costs(
    row_bytes: int,
    num_images: int,
    runs: Runs,
    disk: DiskRates,
    build_hours: float,
    forward_hours: float,
) -> dict[str, Any]:
    """Return what a run reads, whether the disk keeps up, and when the cache has paid.

    Args:
        row_bytes: what is read for one image.
        num_images: images of the corpus.
        runs: the training runs.
        disk: measured rates; without them the disk is taken to keep up.
        build_hours: what the cache takes to build, once.
        forward_hours: the teachers' forward passes over every image, once.
    """
    needed, measured = row_bytes * runs.images_per_s, disk.read_bytes_per_s
    excess_s = 0.0
    if measured is not None:
        excess_s = max(0.0, row_bytes / measured - 1 / runs.images_per_s)
    excess_hours = runs.epochs * num_images * excess_s / 3600
    return {
        "read_bytes_per_s": needed,
        "is_read_covered": None if measured is None else measured >= needed,
        "break_even_runs": break_even_runs(build_hours, runs.epochs * forward_hours, excess_hours),
    }
