"""Summarise the rows as one JSON object: the only figures that documents may quote.

Input: the committed files of rows. Output: ``report.json`` beside them. ``page`` makes the tables
of docs/study.md from it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import scenes
from movekd.t_interval import Interval
from study import plan, results
from study.plan import (
    AFTERWARDS,
    PRIMARY,
    SECONDARY,
    SECONDARY_MORE,
    SEEDS,
    STUDY,
    Arm,
    Contrast,
    Sizes,
    arms,
    runs,
)
from study.results import Row
from study.statistics import Comparison, TTest, accuracies, compare, holm, over_worlds

KINDS = (*scenes.QUESTION_TYPES, "all")
Summary = dict[str, Any]
REPORT = "report.json"


def summarise(folder: Path, sizes: Sizes, is_final: bool) -> Summary:
    """Return all figures of the report.

    An arm is in the test results once all its runs have answered, so that nothing depends on where
    a pass stopped. Until then its validation rows are listed, without a claim.

    Args:
        folder: folder of the rows.
        sizes: sizes of worlds and runs.
        is_final: read the test file; otherwise validation scenes only.

    Raises:
        SystemExit: no run has a row, or the final pass has not run.
    """
    learned = list(results.by_run(results.read(folder, "runs")).values())
    tested = joined_rows(folder) if is_final else []
    if is_final and not results.read(folder, "final"):
        raise SystemExit("study: the test scenes have not been looked at; `final` does.")
    if not learned:
        raise SystemExit(f"study: {folder}/runs.jsonl holds no row; run the study first.")
    complete = {row["arm"] for row in tested}
    pending = [row for row in learned if row["arm"] not in complete]
    summary: Summary = {
        "unit": "world",
        "level": 0.95,
        "num_questions": sizes.num_test if is_final else sizes.num_val,
        "constant_answers": constant_answers(
            sizes.num_test if is_final else sizes.num_val,
            "test" if is_final else "val",
            plan.WORLDS,
        ),
    }
    if is_final:
        summary["test"] = part_of(tested, "test", tested)
    if pending or not is_final:
        summary["val"] = part_of(learned, "val", pending)
    return summary


def joined_rows(folder: Path) -> list[Row]:
    """Return the rows of ``runs`` with test answers, for arms whose runs have all answered."""
    tested = results.by_run(results.read(folder, "final"))
    complete = {a.name for a in arms(everything=True) if all(r in tested for r in runs((a,)))}
    learned = results.by_run(results.read(folder, "runs"))
    return [
        row | tested[run]
        for run, row in learned.items()
        if run in tested and row["arm"] in complete
    ]


def part_of(rows: Sequence[Row], part: str, about: Sequence[Row]) -> Summary:
    """Return arms and contrasts of test or validation scenes.

    Args:
        rows: all rows of the part.
        part: ``test`` or ``val``.
        about: rows of the arms to list.
    """
    values = accuracies(rows, part)
    listed = {row["arm"] for row in about}
    planned = (PRIMARY, *SECONDARY, *SECONDARY_MORE)
    wanted = [c for c in planned if {c.first, c.second} & listed]
    primary = [c for c in (compare(c, values) for c in wanted if c == PRIMARY) if c]
    secondary = [c for c in (compare(c, values) for c in wanted if c != PRIMARY) if c]
    if part == "test":  # validation scenes have no claim, so nothing is corrected there
        secondary = holm(secondary)
    parts = [c for c in (compare(c, values) for c in parts_of_the_recipe(listed)) if c]
    after = [c for c in AFTERWARDS if {c.first, c.second} & listed]
    return {
        "arms": [
            arm_figures(arm, [r for r in rows if r["arm"] == arm.name and r["seed"] in SEEDS], part)
            for arm in arms(everything=True)
            if arm.name in listed
        ],
        "primary": [contrast_figures(c) for c in primary],
        "secondary": [contrast_figures(c) for c in secondary],
        "parts": [contrast_figures(c) for c in parts],
        "afterwards": [contrast_figures(c) for c in (compare(c, values) for c in after) if c],
    }


def parts_of_the_recipe(listed: set[str]) -> list[Contrast]:
    """Return the contrasts of `make study-full` without a claim."""
    planned = {c.name for c in (PRIMARY, *SECONDARY, *SECONDARY_MORE)}
    base = {"official_full": "revised_full", "shuffled_full": "revised_full"}
    base |= {f"only_{teacher}": "minus_attention" for teacher in ("clip", "eva", "convnext", "sam")}
    contrasts = [
        Contrast(base.get(arm.name, "revised_mole"), arm.name)
        for arm in arms(everything=True)
        if arm.name in listed and arm not in STUDY and arm.matches_time_of is None
    ]
    return [c for c in contrasts if c.name not in planned and c.first != c.second]


def arm_figures(arm: Arm, rows: Sequence[Row], part: str) -> Summary:
    """Return the accuracies of an arm, and the final figures of its tokens and routers."""
    found = {kind: over_worlds(accuracies(rows, part, kind)) for kind in KINDS}
    bits = [row["routing"] for row in rows if "routing" in row]
    seconds = [row["cpu_seconds"]["pretrain"] + row["cpu_seconds"]["finetune"] for row in rows]
    return {
        "arm": arm.name,
        "what": arm.what,
        "runs": len(rows),
        "worlds": sorted({row["world"] for row in rows}),
        "kinds": {kind: rounded(found[kind].mean) for kind in KINDS},
        "accuracy": interval_figures(found["all"]),
        "seconds": _mean(seconds),
        "token_std": _mean([row["token_std"][1] for row in rows]),
        "token_rank": _mean([row["token_rank"][1] for row in rows]),
        "routing_bits": [_mean([b[n] for b in bits]) for n in ("digit_bits", "place_bits")]
        if bits
        else None,
    }


def contrast_figures(comparison: Comparison) -> Summary:
    """Return a comparison as JSON; no document may rest a claim on ``pooled_pairs``."""
    contrast = comparison.contrast
    return {
        "contrast": contrast.name,
        "margin": contrast.margin,
        "pairs": comparison.num_pairs,
        "worlds": [rounded(world) for world in comparison.worlds],
        **_test(comparison.over_worlds),
        "df": comparison.over_worlds.interval.df,
        "p_holm": _significant(comparison.corrected),
        "p_signs": comparison.p_signs,
        "holds": comparison.holds,
        "pooled_pairs": _test(comparison.over_pairs),
    }


def constant_answers(num_scenes: int, part: scenes.Part, worlds: Sequence[int]) -> dict[str, float]:
    """Return the accuracy of the best constant answer per question type of a part.

    It is the most frequent answer among the questions of the part, so no constant scores more. Mean
    over worlds. Questions are drawn again from their seeds, without images.
    """
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    number, _, turns = scenes.PARTS[part]
    for world in worlds:
        rng = np.random.default_rng([world, number])
        _, asked = scenes.draw_questions(num_scenes, rng, turns)
        answers: dict[str, list[str]] = {}
        for ((kind, _, answer),) in asked:
            answers.setdefault(kind, []).append(answer)
        commonest = {kind: max(map(given.count, given)) for kind, given in answers.items()}
        for kind, given in answers.items():
            shares[kind].append(commonest[kind] / len(given))
        shares["all"].append(sum(commonest.values()) / len(asked))
    return {kind: _mean(found) for kind, found in shares.items()}


def write(summary: Summary, folder: Path) -> Path:
    """Write the summary beside the rows; the same rows give the same bytes."""
    path = folder / REPORT
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> Summary | None:
    """Return the summary beside the rows; None without one."""
    path = folder / REPORT
    if not path.exists():
        return None
    found: Summary = json.loads(path.read_text(encoding="utf-8"))
    return found


def _test(test: TTest) -> Summary:
    interval = interval_figures(test.interval)
    return {"difference": interval.pop("mean"), **interval, "p": _significant(test.p)}


def interval_figures(interval: Interval) -> Summary:
    """Return an interval as JSON; bounds that are infinite are null."""
    is_finite = np.isfinite(interval.low)
    return {
        "mean": rounded(interval.mean),
        "low": rounded(interval.low) if is_finite else None,  # JSON knows no infinity
        "high": rounded(interval.high) if is_finite else None,
    }


def _mean(values: Sequence[float]) -> float:
    return rounded(sum(values) / len(values))


def rounded(value: float) -> float:
    """Return a figure as the reports hold it."""
    return round(value, 6)


def _significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
