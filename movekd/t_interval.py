"""Compute 95% intervals of means, and of differences of means, by Student's t.

Input: a few figures, one per unit (a seed, a world). Output: an ``Interval``. The quantile is
computed here, because SciPy is no dependency of movekd; a test compares it with SciPy's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Interval:
    """A mean, or a difference of means, and its 95% interval.

    Attributes:
        mean: the mean, or the difference.
        low: lower end; minus infinity where units are too few for an interval.
        high: upper end; infinity where units are too few.
        num: number of units, of both samples together.
        df: degrees of freedom of Student's t; 0 where units are too few.
    """

    mean: float
    low: float
    high: float
    num: int
    df: float

    @property
    def is_bounded(self) -> bool:
        """Whether the units were enough for an interval."""
        return math.isfinite(self.low)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and its interval; that of one value is infinite."""
    sample = np.asarray(values, float)
    mean, num = float(sample.mean()), len(sample)
    error = float(sample.std(ddof=1)) / math.sqrt(num) if num > 1 else math.nan
    return _interval(mean, error, num, num - 1)


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the mean of ``first`` minus that of ``second``, of samples that are not paired.

    A sample of one value gives an infinite interval. The two may have different spreads.

    Source: Welch (1947); degrees of freedom by Satterthwaite (1946).
    """
    samples = [np.asarray(values, float) for values in (first, second)]
    mean = float(samples[0].mean() - samples[1].mean())
    num = sum(map(len, samples))
    if min(map(len, samples)) < 2:
        return _interval(mean, math.nan, num, 0)
    squares = [float(sample.var(ddof=1)) / len(sample) for sample in samples]
    if not (total := sum(squares)):
        return _interval(mean, 0.0, num, num - 2)
    parts = zip(squares, samples, strict=True)
    df = 1 / sum((square / total) ** 2 / (len(sample) - 1) for square, sample in parts)
    return _interval(mean, math.sqrt(total), num, df)


def t_quantile(probability: float, df: float) -> float:
    """Return the value that Student's t with ``df`` degrees of freedom stays below.

    Args:
        probability: of staying below, .5 or more and less than 1.
        df: degrees of freedom, 1 or more; not necessarily whole.
    """
    assert 0.5 <= probability < 1 <= df
    low, high = 0.0, 1.0
    while _central(high, df) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if _central(middle, df) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _central(t: float, df: float) -> float:
    """Return the probability of -t to t.

    Source: Abramowitz and Stegun 26.7.1, with tan(x) = t / sqrt(df), which leaves the integral of
    cos(x) ** (df - 1). For 95% it is smooth from 0 to there: 64 nodes of Gauss give eight digits.
    """
    end = math.atan(t / math.sqrt(df))
    integral = end / 2 * float(_WEIGHTS @ np.cos(end / 2 * (_NODES + 1)) ** (df - 1))
    log_whole = math.lgamma(df / 2) - math.lgamma((df + 1) / 2) + math.log(math.pi) / 2
    return 2 * integral / math.exp(log_whole)


def _interval(mean: float, error: float, num: int, df: float) -> Interval:
    if math.isnan(error):
        return Interval(mean, -math.inf, math.inf, num, 0)
    half = t_quantile((1 + LEVEL) / 2, df) * error if error else 0.0
    return Interval(mean, mean - half, mean + half, num, df)
