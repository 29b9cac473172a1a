"""Intervals, tests and corrections over paired runs.

Accuracies by run come in; a ``Comparison`` a contrast goes out. Runs of two arms are paired by
world and seed: they saw the same scenes, in the same order, from the same start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy import stats

from study.plan import Contrast, RunId
from study.results import Row

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, by Student's t."""

    mean: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """What the pairs of a contrast say.

    Attributes:
        contrast: which.
        difference: mean of first minus second, with its interval over the pairs.
        worlds: the mean difference of each world.
        over_worlds: the interval over the worlds' means instead, of two degrees of freedom.
        p: of the test: two-sided t over the pairs; with a margin, the larger of the two one-sided.
        p_signs: two-sided, from all changes of sign of the differences: no normal distribution
            assumed. None with a margin.
        corrected: p after Holm's correction, where there is one.
    """

    contrast: Contrast
    difference: Interval
    worlds: tuple[float, ...]
    over_worlds: Interval
    p: float
    p_signs: float | None
    corrected: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the claim holds at 5%: a difference, or with a margin none as large as it."""
        return (self.p if self.corrected is None else self.corrected) < 1 - LEVEL


def accuracies(rows: Sequence[Row], part: str, kind: str = "all") -> dict[RunId, float]:
    """Return the accuracy of each run on a kind of question of the validation or test scenes."""
    return {
        RunId(row["seed"], row["world"], row["arm"]): row[part][kind][0] / row[part][kind][1]
        for row in rows
    }


def interval(values: Sequence[float]) -> Interval:
    """Return mean and 95% interval; of a single value the interval is not finite."""
    sample = np.asarray(values, float)
    mean, num = float(sample.mean()), len(sample)
    if num < 2:
        return Interval(mean, float("-inf"), float("inf"), num)
    half = stats.t.ppf((1 + LEVEL) / 2, num - 1) * sample.std(ddof=1) / np.sqrt(num)
    return Interval(mean, float(mean - half), float(mean + half), num)


def compare(contrast: Contrast, values: Mapping[RunId, float]) -> Comparison | None:
    """Return what the runs that both arms have say; None with fewer than two pairs."""
    pairs = {
        (run.world, run.seed): value - values[other]
        for run, value in sorted(values.items())
        if run.arm == contrast.first
        and (other := RunId(run.seed, run.world, contrast.second)) in values
    }
    if len(pairs) < 2:
        return None
    differences = np.array(list(pairs.values()))
    numbers = sorted({world for world, _ in pairs})
    worlds = [
        float(np.mean([d for (world, _), d in pairs.items() if world == number]))
        for number in numbers
    ]
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    df, p_signs = len(differences) - 1, None
    if contrast.margin is None:
        p = 2 * stats.t.sf(_ratio(abs(differences.mean()), error), df)
        p_signs = sign_flip_p(differences.tolist())
    else:
        p = stats.t.sf(_ratio(contrast.margin - abs(differences.mean()), error), df)
    return Comparison(
        contrast,
        interval(differences.tolist()),
        tuple(worlds),
        interval(worlds),
        float(p),
        p_signs,
    )


def _ratio(distance: float, error: float) -> float:
    """Return distance over standard error, also where all differences are equal."""
    if error > 0:
        return float(distance / error)
    return float(np.sign(distance) * np.inf) if distance else 0.0


def sign_flip_p(differences: Sequence[float], num_draws: int = 20_000) -> float:
    """Return the share of changes of sign that give a mean at least as far from zero.

    Over all changes of up to 14 differences, over ``num_draws`` drawn ones beyond that.
    """
    sample = np.asarray(differences, float)
    if len(sample) <= 14:
        signs = np.array(list(product((1, -1), repeat=len(sample))))
    else:
        signs = np.random.default_rng(0).choice((1, -1), (num_draws, len(sample)))
    means = np.abs(signs @ sample)
    return float((means >= abs(sample.sum()) - 1e-12).mean())


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with p corrected for their number.

    Source: Holm (1979): the k-th smallest of m is multiplied by m - k + 1, and none is smaller
    than one before it.
    """
    order = sorted(range(len(comparisons)), key=lambda i: comparisons[i].p)
    corrected = [0.0] * len(comparisons)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * comparisons[i].p))
        corrected[i] = largest
    return [replace(c, corrected=p) for c, p in zip(comparisons, corrected, strict=True)]
