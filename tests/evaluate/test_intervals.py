"""Tests of movekd.evaluate.intervals against scipy.stats, and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from movekd.evaluate.benchmarks.pope_mme import pope_figures
from movekd.evaluate.intervals import (
    bootstrap_interval,
    mcnemar_p,
    percentiles,
    permutation_p,
    resampled_sums,
)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_binomial_test(only_first, only_second):
    count = only_first + only_second
    expected = stats.binomtest(only_first, count, 0.5).pvalue if count else 1.0
    assert mcnemar_p(only_first, only_second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_large_counts_underflows_to_0_and_does_not_overflow():
    assert mcnemar_p(0, 40_000) == 0
    assert mcnemar_p(20_000, 20_000) == 1
    expected = stats.binomtest(19_800, 40_000, 0.5).pvalue
    assert mcnemar_p(19_800, 20_200) == pytest.approx(expected, rel=1e-6)


def answers(rng, num_images, *, mean=0.7, spread=1.0):
    """Right answers and questions per image, (I, 2): images have 1 to 12, and are easy or hard."""
    asked_I = rng.integers(1, 13, num_images)
    chance_I = rng.beta(mean * spread, (1 - mean) * spread, num_images)
    return np.stack([rng.binomial(asked_I, chance_I), asked_I], 1).astype(float)


def accuracy(sums_RS):
    return sums_RS[:, 0] / sums_RS[:, 1]


def test_a_mean_has_the_interval_of_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=150)
    ours = percentiles(resampled_sums(values[:, None], 20_000)[:, 0] / 150)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx(theirs, abs=0.03 * (theirs.high - theirs.low))
    assert bootstrap_interval(values) == pytest.approx(theirs, abs=0.1 * (theirs[1] - theirs[0]))


def test_a_ratio_of_clusters_has_the_interval_of_scipy():
    right, asked = answers(np.random.default_rng(1), 150).T
    ours = percentiles(accuracy(resampled_sums(np.stack([right, asked], 1), 20_000)))
    theirs = stats.bootstrap(
        (right, asked),
        lambda r, n, axis: r.sum(axis) / n.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours == pytest.approx(theirs, abs=0.03 * (theirs.high - theirs.low))


def test_popes_f1_has_the_interval_of_scipy():
    rng = np.random.default_rng(3)
    labels_IQ, said_IQ = rng.random((2, 120, 6)) < 0.5
    said_IQ = np.where(rng.random((120, 6)) < 0.7, labels_IQ, said_IQ)
    both, said, labels = ((labels_IQ & said_IQ).sum(1), said_IQ.sum(1), labels_IQ.sum(1))
    counts_IC = np.stack([(labels_IQ == said_IQ).sum(1), both, said, labels, np.full(120, 6)], 1)
    ours = percentiles(pope_figures(resampled_sums(counts_IC, 20_000))["f1"])
    theirs = stats.bootstrap(
        (both, said, labels),
        lambda b, s, n, axis: 200 * b.sum(axis) / (s.sum(axis) + n.sum(axis)),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert ours == pytest.approx(theirs, abs=0.03 * (theirs.high - theirs.low))


def test_intervals_of_clusters_cover_and_those_of_questions_do_not():
    """Of 300 data sets, about 95% of the intervals hold the truth (.70) if images are drawn."""
    rng, by_image, by_question = np.random.default_rng(5), [], []
    for _ in range(300):
        counts_IS = answers(rng, 80)
        low, high = percentiles(accuracy(resampled_sums(counts_IS, 400)))
        by_image.append(low <= 0.7 <= high)
        right, asked = counts_IS.sum(0).astype(int)
        naive = stats.binomtest(int(right), int(asked)).proportion_ci(0.95, "wilson")
        by_question.append(naive.low <= 0.7 <= naive.high)
    assert 0.90 <= np.mean(by_image) <= 0.98
    assert np.mean(by_question) < 0.80


def test_permutations_have_the_p_of_scipys_exact_sign_flips():
    rng = np.random.default_rng(6)
    one, other = rng.normal(0.5, 1, (12, 1)), rng.normal(0, 1, (12, 1))
    exact = stats.permutation_test(
        (one[:, 0], other[:, 0]),
        lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert permutation_p(one, other, lambda s: s[:, 0]) == pytest.approx(exact, abs=0.015)
    assert 0.02 < exact < 0.98


def test_equal_models_are_called_different_as_often_as_promised():
    """Two models of one accuracy on images of unequal difficulty: p < .05 in about 5% of 400."""
    rng, found = np.random.default_rng(7), []
    for number in range(400):
        asked_I = rng.integers(1, 13, 60)
        chance_I = rng.beta(0.7, 0.3, 60)
        one, other = (
            np.stack([rng.binomial(asked_I, chance_I), asked_I], 1).astype(float) for _ in "ab"
        )
        found.append(permutation_p(one, other, accuracy, 199, seed=number) <= 0.05)
    assert 0.025 <= np.mean(found) <= 0.085


def test_a_model_against_itself_has_p_1():
    counts_IS = answers(np.random.default_rng(8), 40)
    assert permutation_p(counts_IS, counts_IS.copy(), accuracy) == 1
