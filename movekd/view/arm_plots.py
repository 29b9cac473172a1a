"""Plot the curves of several arms, one figure per logged value.

Input: arms of ``arms``. Output: figures for ``compare_page``. An arm is a bold line: the mean of
its ended runs, where all of them logged. Each run is a thin line, dashed if it has not ended.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from movekd.view.arms import Arm, ComparedRun
from movekd.view.measures import Measure
from movekd.view.plots import HEIGHT, WIDTH, finish_axes

_DASHES = ("-", "--", ":", "-.")
_NUM_COLOURS = 10
_MARKED = 12
"""Curves of fewer points have a marker at each."""


def x_axis(runs: Sequence[ComparedRun]) -> str:
    """Return what the curves are drawn over: samples, if runs have steps of other sizes."""
    sizes = {run.samples_per_step for run in runs}
    return "samples seen" if len(sizes) > 1 and None not in sizes else "optimizer step"


def arm_style(at: int) -> tuple[str, str]:
    """Return colour and dash of an arm by its place, as matplotlib names them."""
    return f"C{at % _NUM_COLOURS}", _DASHES[at // _NUM_COLOURS % len(_DASHES)]


def arm_figures(
    arms: Sequence[Arm], measures: Sequence[Measure], x: str
) -> Iterator[tuple[Measure, Figure]]:
    """Yield a figure of the curves of each measure that has any, by its first statistic."""
    seen: set[str] = set()
    for measure in measures:
        if measure.name in seen:
            continue
        seen.add(measure.name)
        figure = Figure((WIDTH, HEIGHT))
        axes = figure.subplots()
        for at, arm in enumerate(arms):
            _draw(axes, arm, measure.name, x, arm_style(at))
        if axes.lines:
            finish_axes(axes, x)
            yield measure, figure


def _draw(axes: Any, arm: Arm, name: str, x: str, style: tuple[str, str]) -> None:
    colour, dash = style
    curves = [(run, found) for run in arm.runs if (found := _curve(run, name, x))]
    finished = [found for run, found in curves if run.state == "finished"]
    for run, found in curves:
        is_only = len(finished) == 1 and run.state == "finished"
        if not is_only:
            line = dash if run.state == "finished" else "--"
            axes.plot(list(found), list(found.values()), line, color=colour, lw=0.8, alpha=0.45)
    common = [at for at in (finished[0] if finished else ()) if all(at in f for f in finished)]
    if common:
        means = [fmean(found[at] for found in finished) for at in common]
        marker = "o" if len(common) < _MARKED else ""
        axes.plot(common, means, dash, color=colour, lw=2, marker=marker, ms=4)


def _curve(run: ComparedRun, name: str, x: str) -> dict[float, float]:
    """Return x -> value of a logged figure; NaN is a gap."""
    steps, values = run.log.series(name)
    per_x = (run.samples_per_step or math.nan) if x == "samples seen" else 1
    return {step * per_x: value for step, value in zip(steps, values, strict=True)}
