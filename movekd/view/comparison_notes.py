"""Say what a reader of a comparison must know about its runs, before any figure.

Input: the arms, and the measures that were found. Output: sentences, for the page and the terminal.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from movekd.errors import shorten
from movekd.view.arms import Arm, ComparedRun
from movekd.view.measures import Measure, data_set

_WORDS = {"training": "still training", "interrupted": "interrupted"}


def describe_runs(arms: Sequence[Arm], measures: Sequence[Measure]) -> list[str]:
    """Return what is unfinished, skipped, repeated, not finite or mixed, a sentence each."""
    runs = [run for arm in arms for run in arm.runs]
    notes = _unfinished(runs)
    notes += [
        f"Arm {arm.name}: its runs differ not only in their seeds, but in "
        f"{shorten(', '.join(arm.mixed), 300)}."
        for arm in arms
        if arm.mixed
    ]
    for arm in arms:
        times = Counter((data_set(run), run.seed) for run in arm.finished)
        notes += [
            f"Arm {arm.name}: {num} runs of seed {seed} count as one, by their mean."
            for (_, seed), num in sorted(times.items())
            if num > 1
        ]
    single = [arm.name for arm in arms if len({run.seed for run in arm.finished}) == 1]
    if single:
        notes.append(f"One seed, so no interval over seeds: {shorten('; '.join(single), 600)}.")
    notes += _not_finite(runs, measures)
    notes += _teachers(runs)
    notes += [
        f"{run.folder}: left out, because it cannot be read as what it should be: "
        f"{'. '.join(run.log.left_out)}."
        for run in runs
        if run.log.left_out
    ]
    return notes


def _unfinished(runs: Sequence[ComparedRun]) -> list[str]:
    notes = []
    for state, words in _WORDS.items():
        found = [run for run in runs if run.state == state]
        if found:
            notes.append(
                f"{len(found)} of {len(runs)} runs {words}: in the curves up to the last "
                f"checkpoint, in no figure: {_folders(found)}."
            )
    empty = [run for run in runs if not run.log.steps and not run.log.evaluations]
    if empty:
        notes.append(f"{len(empty)} of {len(runs)} runs logged no step: {_folders(empty)}.")
    return notes


def _not_finite(runs: Sequence[ComparedRun], measures: Sequence[Measure]) -> list[str]:
    notes = []
    for measure in measures:
        finished = [run for run in runs if run.state == "finished"]
        found = [run for run in finished if math.isnan(measure.value(run) or 0.0)]
        if found:
            what = f"{measure.name}, {measure.at}"
            notes.append(f"{what}: NaN or infinite, so not in the means: {_folders(found)}.")
    return notes


def _teachers(runs: Sequence[ComparedRun]) -> list[str]:
    skipped: dict[tuple[str, int], list[ComparedRun]] = {}
    for run in runs:
        for row in filter(lambda row: row.skipped, run.log.teachers):
            skipped.setdefault((row.teacher, row.skipped), []).append(run)
    notes = [
        f"Teacher {name} skipped {num:,} images of its cache, in {len(found)} of {len(runs)} runs: "
        f"{_folders(found)}."
        for (name, num), found in sorted(skipped.items())
    ]
    random = sorted({row.teacher for run in runs for row in run.log.teachers if row.random_weights})
    if random:
        notes.append(
            f"Teachers with random weights: {shorten(', '.join(random))}. Such runs test the "
            "software; they say nothing about the method."
        )
    return notes


def _folders(runs: Iterable[ComparedRun]) -> str:
    return shorten(", ".join(run.folder for run in runs), 600)
