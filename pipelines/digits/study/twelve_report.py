"""Summarise the study with twelve worlds as ``report.json``: the only figures that docs may quote.

Input: its rows. Output: two parts with worlds as units. ``main`` has the main arms and the claims,
``rest`` the single parts, experts, controls and ideas, in the worlds that have them. Until every
planned run of a part has answered the test scenes, the part is of validation scenes and of worlds
whose runs of it all have a row, and claims nothing.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from movekd.t_interval import LEVEL
from study import results
from study.plan import Arm, Contrast, RunId, runs
from study.plan_twelve import (
    ARMS,
    MAIN_ARMS,
    MAIN_CONTRASTS,
    MAIN_OTHERS,
    MARGIN,
    OTHER_CONTRASTS,
    PART_CONTRASTS,
    PART_WORLDS,
    PRIMARY,
    SECONDARY,
)
from study.results import Row
from study.statistics import accuracies, compare, over_worlds, t_test
from study.summary import (
    Summary,
    arm_figures,
    constant_answers,
    contrast_figures,
    interval_figures,
    rounded,
)
from study.worlds import UNSEEN_LOOKS

PROBES = ("linear cls", "linear patches", "knn cls", "knn patches")


class Answers(NamedTuple):
    """Rows of planned runs, and of which scenes their accuracies are."""

    part: Literal["test", "val"]
    """``test`` if all planned runs have answered, ``val`` before."""
    worlds: list[int]
    """Worlds in which all planned runs have a row."""
    rows: list[Row]


def summarise(folder: Path) -> Summary:
    """Return all figures of the study.

    Raises:
        SystemExit: no world has a row of every main arm.
    """
    learned = results.by_run(results.read(folder, "runs"))
    tested = results.by_run(results.read(folder, "final"))
    main = _answers(runs(MAIN_ARMS), learned, tested)
    if main is None:
        raise SystemExit(f"study: no world of {folder}/runs.jsonl has a row of every main arm.")
    planned = [run for run in runs(ARMS) if run.world in PART_WORLDS]
    rest = _answers(planned, learned, tested)
    return {
        "unit": "world",
        "level": LEVEL,
        "main": main_figures(main),
        "rest": None if rest is None else rest_figures(rest),
    }


def _answers(
    planned: Sequence[RunId], learned: Mapping[RunId, Row], tested: Mapping[RunId, Row]
) -> Answers | None:
    """Return the rows of the planned runs; None before a world has all of them."""
    is_final = all(run in tested for run in planned)
    have = tested if is_final else learned
    worlds = [
        world
        for world in sorted({run.world for run in planned})
        if all(run in have for run in planned if run.world == world)
    ]
    rows = [
        learned[run] | (tested[run] if is_final else {}) for run in planned if run.world in worlds
    ]
    return Answers("test" if is_final else "val", worlds, rows) if rows else None


def main_figures(found: Answers) -> Summary:
    """Return the claims and what else is known of the main arms."""
    values = accuracies(found.rows, found.part)
    is_final = found.part == "test"
    summary: Summary = {
        **_head(found, MAIN_ARMS),
        "constant_answers": constant_answers(num_questions(found), found.part, found.worlds),
        "claims": claims(values, is_final=is_final),
        "mixed_model": mixed_model(PRIMARY, values),
        "others": [contrast_figures(c) for c in _compared(MAIN_OTHERS, values)],
    }
    if is_final:
        summary["unseen"] = {look: more_figures(found.rows, look) for look in UNSEEN_LOOKS}
        summary["probe"] = {
            name: more_figures(
                [row | {"probe": {"all": row["probe"][name]}} for row in found.rows], "probe"
            )
            for name in PROBES
        }
    return summary


def rest_figures(found: Answers) -> Summary:
    """Return what each part gives, and the experts, controls and ideas; nothing is claimed."""
    values = accuracies(found.rows, found.part)
    return {
        **_head(found, [arm for arm in ARMS if arm not in MAIN_ARMS]),
        "parts": [contrast_figures(c) for c in _compared(PART_CONTRASTS, values)],
        "others": [contrast_figures(c) for c in _compared(OTHER_CONTRASTS, values)],
    }


def _head(found: Answers, arms: Sequence[Arm]) -> Summary:
    return {
        "part": found.part,
        "worlds": found.worlds,
        "num_questions": num_questions(found),
        "arms": [
            arm_figures(arm, [row for row in found.rows if row["arm"] == arm.name], found.part)
            for arm in arms
        ],
    }


def num_questions(found: Answers) -> int:
    """Return the number of questions of a world."""
    total: int = found.rows[0][found.part]["all"][1]
    return total


def _compared(contrasts: Sequence[Contrast], values: Mapping[RunId, float]) -> list[Any]:
    return [found for found in (compare(c, values) for c in contrasts) if found is not None]


def claims(values: Mapping[RunId, float], *, is_final: bool) -> list[Summary]:
    """Return the primary contrast and the secondary ones in their order, each with its outcome.

    ``better`` and ``worse``: two-sided p below 5%. ``equal``, only for experts and full
    fine-tuning: within the margin by two one-sided tests. ``open``: none of these. After the first
    open one nothing is claimed, and on validation scenes nothing is.
    """
    found, may_claim = [], is_final
    for contrast in (PRIMARY, *SECONDARY):
        compared = compare(contrast, values)
        assert compared is not None, f"{contrast.name} has rows"
        mean, outcome = compared.over_worlds.interval.mean, "open"
        equal = t_test(compared.worlds, MARGIN).p if contrast == SECONDARY[0] else None
        if compared.holds:
            outcome = "better" if mean > 0 else "worse"
        elif equal is not None and equal < 1 - LEVEL:
            outcome = "equal"
        may_claim = may_claim and outcome != "open"
        found.append(
            contrast_figures(compared)
            | {"p_equal": equal, "outcome": outcome, "claimed": may_claim}
        )
    return found


def mixed_model(contrast: Contrast, values: Mapping[RunId, float]) -> Summary:
    """Return the difference of two arms by a linear mixed model of its pairs, fitted by REML.

    ``difference = mean + world + pair``, both random and normal. Its interval is by the normal
    distribution, so with few worlds it is too narrow; the test over worlds decides.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    pairs = {
        run: value - values[RunId(run.seed, run.world, contrast.second)]
        for run, value in sorted(values.items())
        if run.arm == contrast.first
    }
    points = 100 * np.array(list(pairs.values()))  # it takes variances below 1e-5 for none
    groups = np.array([run.world for run in pairs])
    if len(set(groups)) < 3:
        return {"contrast": contrast.name, "difference": None}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fitted = MixedLM(points, np.ones(len(pairs)), groups).fit(reml=True)
    low, high = fitted.conf_int(1 - LEVEL)[0]
    return {
        "contrast": contrast.name,
        "difference": rounded(fitted.fe_params[0] / 100),
        "low": rounded(low / 100),
        "high": rounded(high / 100),
        "p": float(f"{fitted.pvalues[0]:.4g}"),
        "std_between_worlds": rounded(float(np.sqrt(max(fitted.cov_re[0][0], 0))) / 100),
        "std_between_pairs": rounded(float(np.sqrt(fitted.scale)) / 100),
        "warnings": sorted({str(each.message) for each in said}),
    }


def more_figures(rows: Sequence[Row], part: str) -> Summary:
    """Return accuracies and contrasts of the main arms on something else than the test scenes."""
    values = accuracies(rows, part)
    return {
        "arms": {arm.name: interval_figures(over_worlds(_of(arm, values))) for arm in MAIN_ARMS},
        "contrasts": [contrast_figures(c) for c in _compared(MAIN_CONTRASTS, values)],
    }


def _of(arm: Arm, values: Mapping[RunId, float]) -> dict[RunId, float]:
    return {run: value for run, value in values.items() if run.arm == arm.name}
