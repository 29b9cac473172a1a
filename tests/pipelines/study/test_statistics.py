"""Intervals and tests against scipy's own and against cases worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from study.plan import Contrast, RunId
from study.statistics import accuracies, compare, holm, interval, sign_flip_p

RANDOM = np.random.default_rng(0)
PAIRS = [(seed, world) for seed in range(4) for world in range(3)]


def values_of(**arms):
    return {
        RunId(seed, world, arm): float(value)
        for arm, values in arms.items()
        for (seed, world), value in zip(PAIRS, values, strict=True)
    }


def test_an_interval_is_scipys():
    sample = RANDOM.normal(0.5, 0.1, 12)
    found = interval(sample.tolist())
    expected = stats.t.interval(0.95, 11, sample.mean(), stats.sem(sample))
    assert (found.low, found.high) == pytest.approx(expected)
    assert interval([0.5]).high == float("inf")


def test_a_difference_is_tested_by_pairs_as_scipy_does():
    first, second = RANDOM.normal(0.5, 0.1, (2, 12))
    found = compare(Contrast("a", "b"), values_of(a=first, b=second))
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert found.difference.num == 12
    by_world = [(first - second)[w::3].mean() for w in range(3)]
    assert found.worlds == pytest.approx(by_world)
    assert found.over_worlds == interval(by_world)


def test_only_runs_that_both_arms_have_are_compared():
    values = values_of(a=np.arange(12), b=np.arange(12) - 1)
    del values[RunId(3, 2, "b")]
    values[RunId(9, 0, "a")] = 100.0
    found = compare(Contrast("a", "b"), values)
    assert found is not None
    assert (found.difference.num, found.difference.mean, found.p) == (11, 1.0, 0.0)
    assert compare(Contrast("a", "c"), values) is None


def test_equivalence_is_two_one_sided_tests():
    differences = RANDOM.normal(0.002, 0.01, 12)
    second = RANDOM.normal(0.5, 0.1, 12)
    values = values_of(a=second + differences, b=second)
    found = compare(Contrast("a", "b", margin=0.01), values)
    assert found is not None
    sides = [
        stats.ttest_1samp(differences, -0.01, alternative="greater").pvalue,
        stats.ttest_1samp(differences, 0.01, alternative="less").pvalue,
    ]
    assert found.p == pytest.approx(max(sides))
    far = compare(Contrast("a", "b", margin=0.001), values)
    assert far is not None
    assert not far.holds
    equal = compare(Contrast("a", "b", margin=0.01), values_of(a=second, b=second))
    assert equal is not None
    assert equal.holds


def test_arms_that_do_not_differ_at_all_have_no_difference():
    same = compare(Contrast("a", "b"), values_of(a=np.ones(12), b=np.ones(12)))
    assert same is not None
    assert (same.p, same.p_signs, same.holds) == (1.0, 1.0, False)


def test_signs_by_hand():
    assert sign_flip_p([1, 2, 3]) == 2 / 8
    assert sign_flip_p([1, -1]) == 1.0
    assert sign_flip_p([1.0] * 36) < 0.001


def test_holm_by_hand():
    found = compare(Contrast("a", "b"), values_of(a=np.arange(12), b=RANDOM.normal(size=12)))
    assert found is not None
    given = [0.04, 0.01, 0.03, 0.5]
    corrected = [c.corrected for c in holm([replace(found, p=p) for p in given])]
    assert corrected == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert [c.holds for c in holm([replace(found, p=p) for p in given])] == [
        False,
        True,
        False,
        False,
    ]


def test_accuracies_are_right_over_asked():
    rows = [{"arm": "a", "world": 1, "seed": 2, "val": {"all": [3, 4], "sum": [1, 2]}}]
    assert accuracies(rows, "val") == {RunId(2, 1, "a"): 0.75}
    assert accuracies(rows, "val", "sum") == {RunId(2, 1, "a"): 0.5}
