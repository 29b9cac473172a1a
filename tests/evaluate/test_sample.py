"""Tests of movekd.evaluate.sample: intervals and comparisons draw whole images."""

import numpy as np
import pytest

from movekd.evaluate.intervals import bootstrap_interval
from movekd.evaluate.sample import (
    MCNEMAR,
    PERMUTATION,
    Scored,
    accuracy_sample,
    compare,
)


def made(scores, images=None):
    """A sample of one question per image, or of the given images."""
    images = range(len(scores)) if images is None else images
    return accuracy_sample(Scored(str(i), float(s)) for i, s in zip(images, scores, strict=True))


def random_right(seed, count=60, chance=0.6):
    return np.random.default_rng(seed).random(count) < chance


def test_one_question_per_image_has_the_interval_of_a_mean():
    right = random_right(1)
    low, high = bootstrap_interval(right.astype(float))
    assert made(right).interval == pytest.approx((100 * low, 100 * high))


def test_a_question_asked_three_times_about_its_image_says_nothing_new():
    right = random_right(2)
    once, thrice = made(right), made(np.repeat(right, 3), np.repeat(np.arange(60), 3))
    assert thrice.interval == pytest.approx(once.interval)
    naive = made(np.repeat(right, 3))  # as if 180 images were known
    width = np.diff([once.interval, naive.interval]).ravel()
    assert width[1] < 0.7 * width[0]


def test_the_order_of_questions_within_images_does_not_matter():
    right, images = random_right(3), np.repeat(np.arange(20), 3)
    order = np.argsort(np.tile([2, 0, 1], 20) + 3 * images)
    assert made(right, images).interval == made(right[order], images[order]).interval


def test_rows_are_means_and_a_category_is_read_on_the_same_draws():
    scored = [Scored(str(i // 2), i % 3 / 2, ("even",) if i % 2 == 0 else ()) for i in range(40)]
    sample = accuracy_sample(scored)
    assert list(sample.rows()) == ["even", "all"]
    assert sample.rows()["all"]["accuracy"] == pytest.approx(
        100 * np.mean([unit.score for unit in scored])
    )
    assert sample.rows()["even"]["accuracy"] == pytest.approx(
        100 * np.mean([unit.score for unit in scored[::2]])
    )
    alone = made([unit.score for unit in scored[::2]])
    assert sample.intervals["even"]["accuracy"] == pytest.approx(alone.interval)


@pytest.mark.parametrize(
    ("scores", "images", "test"),
    [
        (random_right(4), None, MCNEMAR),
        (random_right(4) * 0.3, None, PERMUTATION),
        (random_right(4), np.repeat(np.arange(30), 2), PERMUTATION),
        (random_right(4) * np.tile([0, 1], 30), np.repeat(np.arange(30), 2), PERMUTATION),
    ],
)
def test_the_test_fits_what_an_image_has(scores, images, test):
    other = np.array(scores)
    other[:20] = other[:20][::-1]
    found = compare(made(scores, images), made(other, images))
    assert found.test == test
    assert 0 < found.p <= 1
    assert found.difference == pytest.approx(0, abs=1e-9)


def test_mcnemar_and_permutation_agree_where_both_apply():
    one, other = random_right(5, 200, 0.7), random_right(6, 200, 0.6)
    exact = compare(made(one), made(other))
    doubled = np.repeat(np.arange(200), 2)  # every question twice: no longer one per image
    permuted = compare(made(np.repeat(one, 2), doubled), made(np.repeat(other, 2), doubled))
    assert (exact.test, permuted.test) == (MCNEMAR, PERMUTATION)
    assert permuted.p == pytest.approx(exact.p, abs=0.02)
    assert 0.001 < exact.p < 0.9
    assert permuted.interval == pytest.approx(exact.interval)


def test_a_pair_is_read_on_the_same_images():
    """Models that differ on few images have a narrow difference, whatever each one's interval."""
    one = random_right(7, 300)
    other = one.copy()
    other[:6] = ~other[:6]
    found, single = compare(made(one), made(other)), made(one).interval
    assert found.interval[1] - found.interval[0] < 0.5 * (single[1] - single[0])
    assert found.interval[0] <= found.difference <= found.interval[1]
    swapped = compare(made(other), made(one))
    assert swapped.difference == -found.difference
    assert swapped.p == found.p
    assert swapped.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_a_model_against_itself():
    found = compare(made(random_right(8)), made(random_right(8)))
    assert (found.difference, found.interval, found.p) == (0, (0, 0), 1)


def test_what_an_interval_cannot_say_is_said():
    assert made(random_right(9)).caution is None
    assert made(random_right(9, 12)).caution == "12 images are few: the intervals are too narrow"
    assert "gives the same figure" in made([1] * 40).caution
