"""Intervals and tests equal scipy's, and cases worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from study.plan import Contrast, RunId
from study.statistics import TTest, accuracies, compare, holm, sign_flip_p

RANDOM = np.random.default_rng(0)
PAIRS = [(seed, world) for seed in range(4) for world in range(3)]


def values_of(**arms):
    return {
        RunId(seed, world, arm): float(value)
        for arm, values in arms.items()
        for (seed, world), value in zip(PAIRS, values, strict=True)
    }


def by_world(values):
    """Means of the worlds, of values in the order of PAIRS."""
    return [np.asarray(values)[world::3].mean() for world in range(3)]


def test_a_difference_is_tested_by_worlds_as_scipy_does():
    first, second = RANDOM.normal(0.5, 0.1, (2, 12))
    found = compare(Contrast("a", "b"), values_of(a=first, b=second))
    assert found is not None
    expected = stats.ttest_1samp(by_world(first - second), 0.0)
    assert found.worlds == pytest.approx(by_world(first - second))
    assert (found.num_pairs, found.over_worlds.interval.df) == (12, 2)
    assert found.p == found.over_worlds.p == pytest.approx(expected.pvalue)
    bounds = (found.over_worlds.interval.low, found.over_worlds.interval.high)
    assert bounds == pytest.approx(expected.confidence_interval())
    assert found.over_pairs.p == pytest.approx(stats.ttest_rel(first, second).pvalue)


def test_seeds_of_a_world_do_not_add_to_the_sample():
    first, second = RANDOM.normal(0.5, 0.1, (2, 12))
    values = values_of(a=first, b=second)
    again = {RunId(run.seed + 4, run.world, run.arm): value for run, value in values.items()}
    once, twice = (compare(Contrast("a", "b"), v) for v in (values, values | again))
    assert once is not None
    assert twice is not None
    assert once.over_worlds == twice.over_worlds
    assert twice.over_pairs.p < once.over_pairs.p


def test_worlds_count_alike_however_many_pairs_they_have():
    values = values_of(a=np.arange(12), b=np.zeros(12))
    del values[RunId(3, 2, "b")]
    values[RunId(9, 0, "a")] = 100.0
    found = compare(Contrast("a", "b"), values)
    assert found is not None
    assert (found.num_pairs, found.worlds) == (11, (4.5, 5.5, 5.0))
    assert found.over_worlds.interval.mean == 5.0
    assert compare(Contrast("a", "c"), values) is None


def test_a_single_world_has_a_difference_and_no_p():
    values = values_of(a=RANDOM.normal(size=12), b=np.ones(12))
    found = compare(Contrast("a", "b"), {r: v for r, v in values.items() if r.world == 1})
    assert found is not None
    assert (len(found.worlds), found.p, found.holds) == (1, None, False)
    assert found.over_worlds.interval.high == float("inf")
    assert [c.corrected for c in holm([found])] == [None]


def test_equivalence_is_two_one_sided_tests_over_worlds():
    differences = RANDOM.normal(0.002, 0.01, 12)
    second = RANDOM.normal(0.5, 0.1, 12)
    values = values_of(a=second + differences, b=second)
    found = compare(Contrast("a", "b", margin=0.01), values)
    assert found is not None
    sides = [
        stats.ttest_1samp(by_world(differences), -0.01, alternative="greater").pvalue,
        stats.ttest_1samp(by_world(differences), 0.01, alternative="less").pvalue,
    ]
    assert found.p == pytest.approx(max(sides))
    far = compare(Contrast("a", "b", margin=0.0001), values)
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
    assert sign_flip_p([1, 2, 3]) == 2 / 8  # the least that three worlds can give
    assert sign_flip_p([1, -1]) == 1.0


def test_holm_by_hand():
    found = compare(Contrast("a", "b"), values_of(a=np.arange(12), b=RANDOM.normal(size=12)))
    assert found is not None
    given = [
        replace(found, over_worlds=TTest(found.over_worlds.interval, p))
        for p in (0.04, 0.01, None, 0.03, 0.5)
    ]
    corrected = holm(given)
    assert [c.corrected for c in corrected if c.p] == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert [c.holds for c in corrected] == [False, True, False, False, False]


def test_accuracies_are_right_over_asked():
    rows = [{"arm": "a", "world": 1, "seed": 2, "val": {"all": [3, 4], "sum": [1, 2]}}]
    assert accuracies(rows, "val") == {RunId(2, 1, "a"): 0.75}
    assert accuracies(rows, "val", "sum") == {RunId(2, 1, "a"): 0.5}
