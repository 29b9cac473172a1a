"""Compute 95% intervals and paired tests of figures, over the images that were measured.

An interval says how much other test images of the same kind would change a figure. It says nothing
about other training seeds. Whole images are drawn: the questions about one image are not
independent of each other.

Legend: I images, S counts per image, R resamples.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES, NUM_PERMUTATIONS, SEED = 2000, 9999, 0
FEW_IMAGES = 30
"""A percentile interval of fewer images is too narrow."""
Interval = tuple[float, float]
Array = npt.NDArray[np.float64]
_CHUNK = 128


def resampled_sums(
    counts_IS: npt.NDArray[np.floating | np.integer],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Array:
    """Return the sums of counts over images drawn with replacement, float64 (R, S).

    The draws depend only on the number of images and the seed, so those of two models are pairs.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 6; whole clusters
    as in Davison & Hinkley, Bootstrap Methods (1997), section 3.8.
    """
    rng, count = np.random.default_rng(seed), len(counts_IS)
    values_IS = np.asarray(counts_IS, np.float64)
    draws = (rng.integers(0, count, count) for _ in range(num_resamples))
    return np.stack([np.bincount(draw, minlength=count) @ values_IS for draw in draws])


def bootstrap_interval(values_N: Array, seed: int = SEED) -> Interval:
    """Return the 95% percentile interval of the mean over resampled values."""
    return percentiles(resampled_sums(values_N[:, None], seed=seed)[:, 0] / len(values_N))


def percentiles(values_R: Array) -> Interval:
    """Return the middle 95% of a figure's values on resamples, without those that are NaN."""
    low, high = np.nanquantile(values_R, [0.025, 0.975])
    return float(low), float(high)


def permutation_p(
    counts_IS: Array,
    other_IS: Array,
    figure: Callable[[Array], Array],
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = SEED,
) -> float:
    """Return the two-sided p of a figure's difference between two models on the same images.

    If the models are equal, each image's two answers may be exchanged. Each permutation exchanges
    those of half of the images at random and computes the figure again. For a mean this is the
    sign-flip test.

    Args:
        counts_IS: counts of the first model per image.
        other_IS: counts of the second one.
        figure: sums (R, S) -> figure (R,).
        num_permutations: permutations; p is at least 1 / (their number + 1).
        seed: seed of the exchanges.

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005), section 3.6;
    the +1: Phipson & Smyth (2010).
    """
    differs_I = (counts_IS != other_IS).any(1)
    moved_IS = (other_IS - counts_IS)[differs_I]
    totals = counts_IS.sum(0, keepdims=True), other_IS.sum(0, keepdims=True)
    observed = abs(float((figure(totals[0]) - figure(totals[1]))[0]))
    rng, at_least = np.random.default_rng(seed), 0
    for start in range(0, num_permutations, _CHUNK):
        num = min(_CHUNK, num_permutations - start)
        moved_RS = rng.integers(0, 2, (num, len(moved_IS))) @ moved_IS
        difference_R = figure(totals[0] + moved_RS) - figure(totals[1] - moved_RS)
        # equal differences count, also where the order of a sum rounded them apart
        at_least += int((np.abs(difference_R) >= observed - 1e-9 * max(1.0, observed)).sum())
    return (1 + at_least) / (1 + num_permutations)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    Args:
        only_first: questions that only the first model answers right.
        only_second: those that only the second one does.

    Source: the binomial distribution of ``only_first`` among both, with probability 1/2.
    """
    count = only_first + only_second
    term = tail = 1
    for k in range(min(only_first, only_second)):
        term = term * (count - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << count))
