"""What a figure was computed from: counts per image, so that it can be computed on other draws.

Input: the scored questions of one model, with their images. Output: the figures, their 95%
intervals over images, and a paired comparison with a second model.

Legend: Q scored questions, I images, S counts, R resamples.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from movekd.evaluate.intervals import (
    FEW_IMAGES,
    NUM_PERMUTATIONS,
    NUM_RESAMPLES,
    SEED,
    Array,
    Interval,
    mcnemar_p,
    percentiles,
    permutation_p,
    resampled_sums,
)

Figures = dict[str, dict[str, Array]]
"""Row -> name of the figure -> its values (R,)."""
ALL = "all"
PERMUTATION, MCNEMAR = "permutation of whole images", "exact McNemar"


@dataclass(frozen=True)
class Sample:
    """Counts of each scored question, and the figures as functions of the sums.

    Attributes:
        images: the image of each question; the questions about one image are drawn together.
        counts_QS: counts per question, float64.
        figures: sums (R, S) -> all figures; NaN where the sums hold no question of a row.
        headline: row and name of the figure that papers print.
        share: if the headline is 100 times a sum over a number of questions: their two places
            among the S counts.
    """

    images: Sequence[str]
    counts_QS: Array
    figures: Callable[[Array], Figures]
    headline: tuple[str, str]
    share: tuple[int, int] | None = None

    @cached_property
    def counts_IS(self) -> Array:
        """Counts per image, in the order in which the images first occur."""
        place = {image: at for at, image in enumerate(dict.fromkeys(self.images))}
        counts_IS = np.zeros((len(place), self.counts_QS.shape[1]))
        np.add.at(counts_IS, [place[image] for image in self.images], self.counts_QS)
        return counts_IS

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.counts_IS)

    def rows(self) -> dict[str, dict[str, float]]:
        """Return all figures of the questions as they are."""
        found = self.figures(self.counts_QS.sum(0, keepdims=True))
        return {
            row: {name: float(value[0]) for name, value in of.items()} for row, of in found.items()
        }

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """The 95% interval of each figure over images: row -> name -> low, high."""
        found = self.figures(resampled_sums(self.counts_IS))
        return {
            row: {name: percentiles(value_R) for name, value_R in of.items()}
            for row, of in found.items()
        }

    @property
    def interval(self) -> Interval:
        """The 95% interval of the headline."""
        row, name = self.headline
        return self.intervals[row][name]

    def headline_of(self, sums_RS: Array) -> Array:
        """Return the headline of some sums, float64 (R,)."""
        row, name = self.headline
        return self.figures(sums_RS)[row][name]

    @property
    def caution(self) -> str | None:
        """Why the interval says less than it seems to, or None."""
        if self.interval[0] == self.interval[1]:
            return "every draw of images gives the same figure, so the interval says nothing"
        if self.num_images < FEW_IMAGES:
            return f"{self.num_images} images are few: the intervals are too narrow"
        return None


@dataclass(frozen=True)
class Comparison:
    """A model minus a baseline, on the same questions.

    Attributes:
        baseline: the baseline's headline.
        difference: the model's headline minus that.
        interval: its 95% interval; both models are read on the same draws of images.
        p: two-sided.
        test: the test that p comes from.
    """

    baseline: float
    difference: float
    interval: Interval
    p: float
    test: str


def compare(model: Sample, baseline: Sample) -> Comparison:
    """Return the paired comparison of the headlines of two models.

    The test is McNemar's exact one where an image has one question that is right or wrong;
    otherwise whole images are exchanged between the models (``permutation_p``).

    Args:
        model: the model's sample.
        baseline: that of the second model, of the same questions in the same order.
    """
    assert list(model.images) == list(baseline.images)
    of_model, of_baseline = model.counts_IS, baseline.counts_IS
    value, other = (
        float(sample.headline_of(sample.counts_QS.sum(0, keepdims=True))[0])
        for sample in (model, baseline)
    )
    difference_R = model.headline_of(resampled_sums(of_model)) - baseline.headline_of(
        resampled_sums(of_baseline)
    )
    right = None if model.share is None else _right_per_image(model.share, of_model, of_baseline)
    if right is None:
        p, test = permutation_p(of_model, of_baseline, model.headline_of), PERMUTATION
    else:
        moved = right[0] - right[1]
        p, test = mcnemar_p(int((moved > 0).sum()), int((moved < 0).sum())), MCNEMAR
    return Comparison(other, value - other, percentiles(difference_R), p, test)


def _right_per_image(
    share: tuple[int, int], of_model: Array, of_baseline: Array
) -> tuple[Array, Array] | None:
    """Return which images each model has right; None if one has several questions or a part."""
    right, asked = share
    found = of_model[:, right], of_baseline[:, right]
    is_single = of_model[:, asked].max() <= 1
    is_binary = all(np.isin(values, (0.0, 1.0)).all() for values in found)
    return found if is_single and is_binary else None


@dataclass(frozen=True)
class Scored:
    """The score of one question.

    Attributes:
        image: what it is about; ``Question.cluster``.
        score: from 0 to 1.
        categories: rows of the table that it counts in.
        in_all: it counts in the row of all questions, too.
    """

    image: str
    score: float
    categories: tuple[str, ...] = ()
    in_all: bool = True


def accuracy_sample(scored: Iterable[Scored], headline: str = ALL) -> Sample:
    """Return the sample of accuracies in percent: per category, and of ``all`` (the last row)."""
    units = list(scored)
    rows_of = [(*unit.categories, *((ALL,) if unit.in_all else ())) for unit in units]
    names = sorted({name for rows in rows_of for name in rows}, key=lambda n: (n == ALL, n))
    place = {name: 2 * at for at, name in enumerate(names)}
    counts_QS = np.zeros((len(units), 2 * len(names)))
    for at, (unit, rows) in enumerate(zip(units, rows_of, strict=True)):
        for name in rows:
            counts_QS[at, place[name]] += unit.score
            counts_QS[at, place[name] + 1] += 1

    def figures(sums_RS: Array) -> Figures:
        return {
            name: {"accuracy": percent(sums_RS[:, at], sums_RS[:, at + 1], empty=np.nan)}
            for name, at in place.items()
        }

    share = place[headline], place[headline] + 1
    images = [unit.image for unit in units]
    return Sample(images, counts_QS, figures, (headline, "accuracy"), share)


def percent(part_R: Array, whole_R: Array, *, empty: float = 0.0) -> Array:
    """Return 100 part / whole, and ``empty`` where the whole is 0."""
    found = 100 * part_R / np.where(whole_R > 0, whole_R, 1.0)
    return np.where(whole_R > 0, found, empty)


def describe(num_images: int) -> str:
    """Return in words what the intervals are over and how they are made."""
    return (
        f"over {num_images:,} test images, not over training seeds: percentile bootstrap of whole "
        f"images, {NUM_RESAMPLES:,} resamples, seed {SEED}"
    )


def describe_test(test: str) -> str:
    """Return a test's name, with what its p depends on."""
    return test if test == MCNEMAR else f"{test}, {NUM_PERMUTATIONS:,} draws, seed {SEED}"
