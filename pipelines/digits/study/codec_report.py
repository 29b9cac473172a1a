"""Summarise the comparison of codecs as ``report.json``, which docs/codecs.md is written from.

Input: the rows of the comparison. Until all runs have answered the test scenes, the summary is of
validation scenes and of the seeds that every codec has in every world, and claims nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from study import results
from study.plan import CODEC_ARMS, CODEC_CONTRASTS, CODEC_SEEDS, WORLDS, Arm, RunId, runs
from study.queue import Place
from study.results import Row
from study.statistics import accuracies, compare, over_worlds
from study.summary import Summary, contrast_figures, interval_figures, write

SIZES = ("row_bytes", "token_bytes")


def summarise(folder: Path) -> Summary:
    """Return all figures of the comparison.

    Raises:
        SystemExit: no seed has a row of every codec in every world.
    """
    learned = results.by_run(results.read(folder, "runs"))
    tested = results.by_run(results.read(folder, "final"))
    planned = runs(CODEC_ARMS)
    is_final = all(run in tested for run in planned)
    seeds = [seed for seed in CODEC_SEEDS if all(run in learned for run in _of_seed(seed))]
    if not seeds:
        raise SystemExit(f"study: no seed of {folder}/runs.jsonl has a row of every codec yet.")
    part = "test" if is_final else "val"
    rows = [learned[run] | tested.get(run, {}) for run in planned if run.seed in seeds]
    return {"unit": "world", "part": part, "seeds": seeds, **_figures(rows, part)}


def _of_seed(seed: int) -> list[RunId]:
    return [RunId(seed, world, arm.name) for world in WORLDS for arm in CODEC_ARMS]


def _figures(rows: Sequence[Row], part: str) -> Summary:
    values = accuracies(rows, part)
    codecs = []
    for arm in CODEC_ARMS:
        mine = [row for row in rows if row["arm"] == arm.name]
        accuracy = over_worlds(accuracies(mine, part))
        codecs.append(
            {
                "codec": arm.what,
                "runs": len(mine),
                **_sizes(mine, arm),
                "energy_error": _energy(mine),
                "accuracy": interval_figures(accuracy),
            }
        )
    contrasts, is_open = [], part == "test"
    for contrast in CODEC_CONTRASTS:
        found = compare(contrast, values)
        assert found is not None, f"{contrast.name} has rows"
        is_open = is_open and found.holds
        contrasts.append(contrast_figures(found) | {"claimed": is_open})
    questions = rows[0][part]["all"][1]
    return {"num_questions": questions, "codecs": codecs, "contrasts": contrasts}


def _sizes(rows: Sequence[Row], arm: Arm) -> dict[str, int]:
    """Return bytes per image over all teachers; every world has the same."""
    sizes = [
        {name: sum(teacher[name] for teacher in row["cache"].values()) for name in SIZES}
        for row in rows
    ]
    assert all(size == sizes[0] for size in sizes), f"{arm.name} has rows of several sizes"
    return sizes[0]


def _energy(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean over teachers and worlds of the sealed energy errors, and the largest."""
    errors = [teacher["error_energy"] for row in rows for teacher in row["cache"].values()]
    return {"mean": float(f"{np.mean(errors):.4g}"), "largest": max(errors)}


def write_report(place: Place) -> Path:
    """Write ``report.json``; return its path."""
    return write(summarise(place.results), place.results)
