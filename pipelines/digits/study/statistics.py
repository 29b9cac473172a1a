"""Compute intervals, tests and corrections with worlds as the units.

Input: accuracies by run. Output: a ``Comparison`` per contrast. Runs of two arms are paired by
world and seed: they saw the same scenes, in the same order, from the same start. Pairs of one world
share teachers, scenes and questions, so they are not independent: differences are averaged inside
each world first, and Student's t is computed over the means of the worlds. Three worlds leave two
degrees of freedom.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy import stats

from movekd.t_interval import LEVEL, Interval, mean_interval
from study.plan import Contrast, RunId
from study.results import Row


@dataclass(frozen=True)
class TTest:
    """A mean with its interval, and the p value of the contrast's test.

    Attributes:
        interval: interval of the mean.
        p: two-sided t against 0; with a margin, the larger of the two one-sided ones. None for a
            single value.
    """

    interval: Interval
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """The result of a contrast.

    Attributes:
        contrast: the two arms.
        num_pairs: number of pairs.
        worlds: mean difference of each world, first minus second.
        over_worlds: the test with worlds as units.
        over_pairs: the same test with pairs as units, as if pairs of one world were independent.
            The plan asked for it; no claim rests on it.
        p_signs: two-sided, from all sign changes of the means of the worlds; assumes no normal
            distribution. Three worlds cannot give less than .25. None with a margin.
        corrected: p over worlds after Holm's correction; None without a correction.
    """

    contrast: Contrast
    num_pairs: int
    worlds: tuple[float, ...]
    over_worlds: TTest
    over_pairs: TTest
    p_signs: float | None
    corrected: float | None = None

    @property
    def p(self) -> float | None:
        """p over worlds, before any correction."""
        return self.over_worlds.p

    @property
    def holds(self) -> bool:
        """Whether the claim holds at 5%: a difference, or with a margin a smaller difference."""
        p = self.p if self.corrected is None else self.corrected
        return p is not None and p < 1 - LEVEL


def accuracies(rows: Sequence[Row], part: str, kind: str = "all") -> dict[RunId, float]:
    """Return the accuracy of each run on a question type of the validation or test scenes."""
    return {
        RunId(row["seed"], row["world"], row["arm"]): row[part][kind][0] / row[part][kind][1]
        for row in rows
    }


def world_means(values: Mapping[RunId, float]) -> tuple[float, ...]:
    """Return the mean over the runs of each world, in the order of the worlds."""
    worlds = sorted({run.world for run in values})
    return tuple(float(np.mean([v for run, v in values.items() if run.world == w])) for w in worlds)


def over_worlds(values: Mapping[RunId, float]) -> Interval:
    """Return mean and 95% interval of one arm's values with worlds as units."""
    return mean_interval(world_means(values))


def compare(contrast: Contrast, values: Mapping[RunId, float]) -> Comparison | None:
    """Compare two arms over the runs that both have; return None if they share no run."""
    pairs = {
        run: value - values[other]
        for run, value in sorted(values.items())
        if run.arm == contrast.first
        and (other := RunId(run.seed, run.world, contrast.second)) in values
    }
    if not pairs:
        return None
    worlds = world_means(pairs)
    return Comparison(
        contrast,
        len(pairs),
        worlds,
        over_worlds=t_test(worlds, contrast.margin),
        over_pairs=t_test(list(pairs.values()), contrast.margin),
        p_signs=sign_flip_p(worlds) if contrast.margin is None else None,
    )


def t_test(differences: Sequence[float], margin: float | None = None) -> TTest:
    """Test that the mean is not 0; with a margin, that it is nearer to 0 than the margin.

    Source: Schuirmann (1987), two one-sided tests, for the margin.
    """
    found = mean_interval(differences)
    if found.num < 2:
        return TTest(found, None)
    error = np.std(differences, ddof=1) / np.sqrt(found.num)
    if margin is None:
        p = 2 * stats.t.sf(_ratio(abs(found.mean), error), found.df)
    else:
        p = stats.t.sf(_ratio(margin - abs(found.mean), error), found.df)
    return TTest(found, float(p))


def _ratio(distance: float, error: float) -> float:
    """Return distance over standard error, also where all differences are equal."""
    if error > 0:
        return float(distance / error)
    return float(np.sign(distance) * np.inf) if distance else 0.0


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the share of sign changes that give a mean at least as far from zero."""
    sample = np.asarray(differences, float)
    signs = np.array(list(product((1, -1), repeat=len(sample))))
    means = np.abs(signs @ sample)
    return float((means >= abs(sample.sum()) - 1e-12).mean())


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with p corrected for their number; a missing p stays missing.

    Source: Holm (1979): multiply the k-th smallest of m by m - k + 1; none is smaller than the one
    before it.
    """
    given = [(c.p, i) for i, c in enumerate(comparisons) if c.p is not None]
    corrected: dict[int, float] = {}
    largest = 0.0
    for rank, (p, i) in enumerate(sorted(given)):
        largest = max(largest, min(1.0, (len(given) - rank) * p))
        corrected[i] = largest
    return [replace(c, corrected=corrected.get(i)) for i, c in enumerate(comparisons)]
