"""Compare the arms of a sweep: means over seeds, and differences to one arm, with 95% intervals.

Input: the arms of ``arms``. Output: a ``Comparison`` for the page and for JSON. Figures count only
runs that have ended. Two arms are paired by seed where both have it, on the same data and the same
number of samples; otherwise their difference is Welch's, and where they were measured on other
samples or mean other things they are not compared. With several data sets per arm the unit is the
data set: seeds are averaged inside each, because runs that share data are not independent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal

from movekd.errors import ConfigError, did_you_mean, shorten
from movekd.t_interval import Interval, difference_interval, mean_interval
from movekd.view.arms import Arm, ComparedRun, group_runs
from movekd.view.comparison_notes import describe_runs
from movekd.view.measures import (
    COSTS,
    Measure,
    cost,
    data_set,
    differences,
    find_measures,
    meaning,
    measured_on,
    trained_on,
)

MOST_MEASURES = 200
"""Figures that a page shows; a run with many teachers has 60."""
Unit = Literal["seed", "data set"]
Key = tuple[str, str]
"""Data set and seed of a run."""
Values = dict[Key, list[tuple[ComparedRun, float]]]
"""The runs of an arm that have a figure, and their values."""


@dataclass(frozen=True)
class Figure:
    """A figure of one arm.

    Attributes:
        interval: mean over units, and its interval.
        unit: what is independent.
        num_runs: runs behind it.
    """

    interval: Interval
    unit: Unit
    num_runs: int


@dataclass(frozen=True)
class Contrast:
    """The difference of an arm to the baseline in one measure.

    Attributes:
        interval: the difference, the baseline subtracted; None: not compared.
        kind: how they were compared.
        unit: what is independent.
        nums: units of the arm and of the baseline; of pairs the same number twice.
        reason: why they are not compared or not paired, or which units have no partner.
    """

    interval: Interval | None
    kind: Literal["paired", "unpaired", "not compared"]
    unit: Unit
    nums: tuple[int, int]
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One measure of one arm.

    Attributes:
        measure: what.
        arm: name of the arm.
        figure: None: the arm has none.
        contrast: None for the baseline, and without a figure.
    """

    measure: Measure
    arm: str
    figure: Figure | None
    contrast: Contrast | None


@dataclass(frozen=True)
class Comparison:
    """All that the page shows, except curves.

    Attributes:
        keys: dotted keys in which arms differ; each arm has its cells.
        arms: in the order given.
        baseline: name of the arm that others are compared with.
        measures: what any run logged, unfinished ones included.
        rows: measure by measure, arm by arm; of those that a finished run has.
        costs: arm -> cost -> figure.
        notes: what a reader must know, in sentences.
    """

    keys: Sequence[str]
    arms: Sequence[Arm]
    baseline: str
    measures: Sequence[Measure]
    rows: Sequence[Row]
    costs: Mapping[str, Mapping[str, Figure | None]]
    notes: Sequence[str]

    @property
    def num_contrasts(self) -> int:
        """Number of differences with an interval."""
        found = [row.contrast for row in self.rows if row.contrast and row.contrast.interval]
        return sum(c.interval.is_bounded for c in found if c.interval)


def compare_runs(runs: Sequence[ComparedRun], baseline: str | None = None) -> Comparison:
    """Return the comparison of some runs.

    Args:
        runs: at least one.
        baseline: name of the arm to compare with. Default: that of the first run.

    Raises:
        ConfigError: no arm has that name, or a folder is given twice for one arm.
    """
    keys, arms = group_runs(runs)
    names = [arm.name for arm in arms]
    first = arms[0] if baseline is None else next((a for a in arms if a.name == baseline), None)
    if first is None:
        raise ConfigError(
            f"--baseline is '{shorten(baseline)}'; expected the name of an arm: "
            f"{shorten('; '.join(names), 1000)}.{did_you_mean(str(baseline), names)}"
        )
    logged = find_measures([run for arm in arms for run in arm.runs])
    rows, measures = [], logged[:MOST_MEASURES]
    for measure in measures:
        of_arm = {arm.name: _by_unit(arm.finished, measure.value) for arm in arms}
        for arm in arms if any(of_arm.values()) else ():
            contrast, own, other = None, of_arm[arm.name], of_arm[first.name]
            if arm is not first and own and other:
                contrast = _contrast(measure, own, other)
            rows.append(Row(measure, arm.name, _figure(own), contrast))
    costs = {
        arm.name: {name: _figure(_by_unit(arm.finished, partial(cost, name))) for name in COSTS}
        for arm in arms
    }
    notes = describe_runs(arms, measures)
    if len(logged) > len(measures):
        notes.append(f"{len(logged):,} figures were logged; the first {len(measures)} are shown.")
    return Comparison(keys, arms, first.name, measures, rows, costs, notes)


def _by_unit(runs: Sequence[ComparedRun], value: Callable[[ComparedRun], float | None]) -> Values:
    """Return the finite values of some runs and who has them, by data set and seed."""
    found: Values = {}
    for run in runs:
        number = value(run)
        if number is not None and math.isfinite(number):
            found.setdefault((data_set(run), run.seed), []).append((run, number))
    return found


def _means(values: Values) -> dict[Key, float]:
    """Return the mean of each unit; more than one run has repeated it."""
    return {key: fmean(number for _, number in runs) for key, runs in values.items()}


def _over_units(numbers: Mapping[Key, float], unit: Unit) -> list[float]:
    """Return the independent numbers: one per seed, or the mean of each data set."""
    if unit == "seed":
        return list(numbers.values())
    sets = dict.fromkeys(data for data, _ in numbers)
    return [fmean(n for (data, _), n in numbers.items() if data == one) for one in sets]


def _unit(*values: Values) -> Unit:
    return "seed" if max(len({data for data, _ in v}) for v in values) == 1 else "data set"


def _figure(values: Values) -> Figure | None:
    if not values:
        return None
    unit = _unit(values)
    interval = mean_interval(_over_units(_means(values), unit))
    return Figure(interval, unit, sum(map(len, values.values())))


def _contrast(measure: Measure, own: Values, other: Values) -> Contrast:
    """Return how an arm differs from the baseline; both have values."""
    unit = _unit(own, other)
    means = _means(own), _means(other)
    nums = len(_over_units(means[0], unit)), len(_over_units(means[1], unit))
    unlike = _unlike(own, other, partial(meaning, measure))
    if unlike:
        reason = f"other meaning: {_listed(unlike)}"
        return Contrast(None, "not compared", unit, nums, reason)
    shared = {key: {key: own[key]} for key in own if key in other}
    unpaired = {key: _obstacles(measure, pair, {key: other[key]}) for key, pair in shared.items()}
    pairs = {key: means[0][key] - means[1][key] for key, why in unpaired.items() if not why}
    numbers = _over_units(pairs, unit)
    if len(numbers) > 1 or (numbers and min(nums) == 1):
        rest = {key[1]: None for key in sorted({*own, *other}) if key not in pairs}
        reason = f"without partner: seed {_listed(list(rest))}" if rest else ""
        found = mean_interval(numbers)
        return Contrast(found, "paired", unit, (found.num, found.num), reason)
    unlike = _unlike(own, other, partial(measured_on, measure))
    if unlike:
        reason = f"measured on other data: {_listed(unlike)}"
        return Contrast(None, "not compared", unit, nums, reason)
    obstacles = dict.fromkeys(name for why in unpaired.values() for name in why)
    reason = "no seed in common"
    if obstacles or numbers:
        reason = f"not the same: {_listed(list(obstacles))}" if obstacles else "one pair only"
    elif {data for data, _ in own} != {data for data, _ in other}:
        reason = f"not the same: {_listed(_unlike(own, other, trained_on))}"
    samples = (_over_units(mean, unit) for mean in means)
    return Contrast(difference_interval(*samples), "unpaired", unit, nums, reason)


def _obstacles(measure: Measure, own: Values, other: Values) -> list[str]:
    """Return what keeps the runs of one seed from being a pair."""
    return [*_unlike(own, other, partial(measured_on, measure)), *_unlike(own, other, trained_on)]


def _unlike(
    own: Values, other: Values, facts: Callable[[ComparedRun], Mapping[str, Any]]
) -> list[str]:
    """Return the names of facts that are not the same for all runs of two arms."""
    runs = [run for values in (own, other) for found in values.values() for run, _ in found]
    first = facts(runs[0])
    return list(dict.fromkeys(name for run in runs for name in differences(first, facts(run))))


def _listed(names: Sequence[str]) -> str:
    return shorten(", ".join(names), 300)
