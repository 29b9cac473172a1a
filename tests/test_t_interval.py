"""Student's t as SciPy and a published table have it."""

import math

import numpy as np
import pytest
from scipy import stats

from movekd.t_interval import difference_interval, mean_interval, t_quantile

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.95, 0.975])
@pytest.mark.parametrize("df", [1, 1.01, 1.5, 2, 2.7, 3, 4, 7.3, 11, 30, 99.5, 1e3, 1e6])
def test_a_quantile_is_scipys(probability, df):
    assert t_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), 1e-7, 1e-12)


def test_quantiles_of_a_published_table():
    """Student (1908) as printed in textbooks: two-sided 5%."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {df: round(t_quantile(0.975, df), 3) for df in table} == table


@pytest.mark.parametrize("num", [2, 3, 12])
def test_the_interval_of_a_mean_is_scipys(num):
    sample = RANDOM.normal(0.5, 0.1, num)
    found = mean_interval(sample.tolist())
    expected = stats.t.interval(0.95, num - 1, sample.mean(), stats.sem(sample))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.num, found.df, found.is_bounded) == (num, num - 1, True)


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 7), (5, 3)])
def test_the_interval_of_a_difference_is_scipys(first, second):
    samples = RANDOM.normal(0.5, 0.1, first), RANDOM.normal(0.4, 0.01, second)
    found = difference_interval(*(sample.tolist() for sample in samples))
    test = stats.ttest_ind(*samples, equal_var=False)
    expected = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.df == pytest.approx(test.df)
    back = difference_interval(samples[1].tolist(), samples[0].tolist())
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_too_few_values_have_no_interval():
    for found in (mean_interval([0.5]), difference_interval([1.5], [1.0, 1.0])):
        assert (found.mean, found.low, found.high) == (0.5, -math.inf, math.inf)
        assert not found.is_bounded


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([0.5, 0.5]).low == mean_interval([0.5, 0.5]).high == 0.5
    found = difference_interval([1.0, 1.0, 1.0], [0.5, 0.5])
    assert (found.low, found.high) == (0.5, 0.5)
