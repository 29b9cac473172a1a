"""Write a comparison of runs as one HTML file, and as JSON: `movekd report --compare`.

Input: a ``Comparison``. Output: a page that opens from disk, without scripts and without requests
to the network: the arms, their curves, their figures and the differences between them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import to_hex

from movekd.t_interval import Interval
from movekd.view.arm_plots import arm_figures, arm_style, x_axis
from movekd.view.arms import Arm
from movekd.view.comparison import Comparison, Contrast, Figure, Row
from movekd.view.measures import COSTS, GROUPS, Measure
from movekd.view.page import write_page
from movekd.view.plots import to_svg

_COST_WORDS = {
    "seconds_per_step": "s per step",
    "samples_per_second": "samples per s",
    "memory_peak_gib": "peak GiB",
}
_DASH_WORDS = {"-": "", "--": "6 4", ":": "2 3", "-.": "6 3 2 3"}
"""matplotlib's name of a dash -> SVG's."""
_CENTRE = 100
"""Half the width of a bar, in its own units."""


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page; it replaces the file at ``path`` atomically."""
    runs = [run for arm in comparison.arms for run in arm.runs]
    x = x_axis(runs)
    curves: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    for measure, figure in arm_figures(comparison.arms, comparison.measures, x):
        curves[measure.group].append((measure.name, to_svg(figure)))
    write_page(
        path,
        "compare.html.j2",
        name=f"{_count(len(runs), 'run')} in {_count(len(comparison.arms), 'arm')}",
        baseline=comparison.baseline,
        num_contrasts=comparison.num_contrasts,
        notes=comparison.notes,
        keys=comparison.keys,
        costs=list(_COST_WORDS.values()),
        arms=[_arm_row(comparison, at, arm) for at, arm in enumerate(comparison.arms)],
        curves=curves,
        x=x,
        tables=_tables(comparison),
    )


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return the figures of the page as JSON holds them; an end without an interval is null."""
    arms = [
        {
            "name": arm.name,
            "keys": dict(zip(comparison.keys, arm.cells, strict=True)),
            "runs": [
                {
                    "folder": run.folder,
                    "seed": run.seed,
                    "state": run.state,
                    "steps": run.num_steps,
                    "samples": run.num_samples,
                }
                for run in arm.runs
            ],
            "costs": {n: _figure_json(f) for n, f in comparison.costs[arm.name].items()},
        }
        for arm in comparison.arms
    ]
    figures = [
        {"measure": row.measure.name, "at": row.measure.at, "better": row.measure.goal}
        | {"arm": row.arm, "figure": _figure_json(row.figure)}
        | {"difference": _contrast_json(row.contrast)}
        for row in comparison.rows
    ]
    facts = {"baseline": comparison.baseline, "num_differences": comparison.num_contrasts}
    return facts | {"arms": arms, "figures": figures, "notes": list(comparison.notes)}


def _arm_row(comparison: Comparison, at: int, arm: Arm) -> dict[str, Any]:
    """Return what the page shows of an arm: its line, cells, seeds, samples and costs."""
    colour, dash = arm_style(at)
    found = arm.finished or arm.runs
    return {
        "name": arm.name,
        "colour": to_hex(colour),
        "dash": _DASH_WORDS[dash],
        "cells": arm.cells,
        "seeds": ", ".join(dict.fromkeys(run.seed for run in arm.finished)) or "-",
        "finished": f"{len(arm.finished)} of {len(arm.runs)}",
        "steps": _range([run.num_steps for run in found]),
        "samples": _range([run.num_samples for run in found]),
        "costs": [_with_ends(comparison.costs[arm.name][name]) for name in COSTS],
        "folders": [run.folder for run in arm.runs],
    }


def _tables(comparison: Comparison) -> dict[str, list[tuple[str, list[dict[str, Any]]]]]:
    """Return group -> heading and rows of each measure."""
    by_measure: dict[Measure, list[Row]] = {}
    for row in comparison.rows:
        by_measure.setdefault(row.measure, []).append(row)
    tables: dict[str, list[tuple[str, list[dict[str, Any]]]]] = {group: [] for group in GROUPS}
    for measure, rows in by_measure.items():
        better = f" ({measure.goal} is better)" if measure.goal else ""
        ends = [
            abs(end)
            for row in rows
            if row.contrast and row.contrast.interval and row.contrast.interval.is_bounded
            for end in (row.contrast.interval.low, row.contrast.interval.high)
        ]
        shown = [_figure_row(row, comparison.baseline, max(ends, default=0)) for row in rows]
        tables[measure.group].append((f"{measure.name}, {measure.at}{better}", shown))
    return tables


def _figure_row(row: Row, baseline: str, largest: float) -> dict[str, Any]:
    """Return the cells of a measure of an arm."""
    figure, contrast = row.figure, row.contrast
    difference = contrast.interval if contrast else None
    return {
        "arm": row.arm,
        "mean": _number(figure.interval.mean) if figure else "-",
        "interval": _ends(figure.interval) if figure else "",
        "units": _count(figure.interval.num, figure.unit) if figure else "",
        "difference": _number(difference.mean, sign=True) if difference else "",
        "ends": _ends(difference, sign=True) if difference else "",
        "bar": _bar(difference, largest),
        "how": "baseline" if row.arm == baseline else _how(contrast) if figure else "",
    }


def _how(contrast: Contrast | None) -> str:
    """Return how two arms were compared, with the unit and its number."""
    if contrast is None:
        return "not compared: the baseline has none"
    reason = f" ({contrast.reason})" if contrast.reason else ""
    if contrast.kind == "not compared":
        return f"not compared: {contrast.reason}"
    if contrast.kind == "paired":
        return f"paired by {contrast.unit}, {_count(contrast.nums[0], 'pair')}{reason}"
    both = f"{contrast.nums[0]} and {_count(contrast.nums[1], contrast.unit)}"
    return f"not paired (Welch), {both}{reason}"


def _bar(interval: Interval | None, largest: float) -> dict[str, float] | None:
    """Return the places of an interval's ends and mean on a bar with 0 in the middle."""
    if interval is None or not interval.is_bounded or not largest:
        return None
    ends = {"low": interval.low, "mean": interval.mean, "high": interval.high}
    return {name: round(0.95 * _CENTRE * value / largest, 2) for name, value in ends.items()}


def _figure_json(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return _interval_json(figure.interval) | {"unit": figure.unit, "num_runs": figure.num_runs}


def _contrast_json(contrast: Contrast | None) -> dict[str, Any] | None:
    if contrast is None:
        return None
    found = {} if contrast.interval is None else _interval_json(contrast.interval)
    how = {"kind": contrast.kind, "unit": contrast.unit, "reason": contrast.reason}
    return how | {"num_own": contrast.nums[0], "num_baseline": contrast.nums[1]} | found


def _interval_json(interval: Interval) -> dict[str, Any]:
    ends = {"low": interval.low, "high": interval.high, "df": interval.df}
    known = ends if interval.is_bounded else dict.fromkeys(ends)
    return {"mean": interval.mean, "num_units": interval.num} | known


def _with_ends(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    ends = f" ({_ends(figure.interval, digits=3)})" if figure.interval.is_bounded else ""
    return f"{_number(figure.interval.mean, digits=3)}{ends}"


def _ends(interval: Interval, *, digits: int = 4, sign: bool = False) -> str:
    if not interval.is_bounded:
        return "no interval"
    low, high = (_number(end, digits=digits, sign=sign) for end in (interval.low, interval.high))
    return f"{low} to {high}"


def _number(value: float, *, digits: int = 4, sign: bool = False) -> str:
    return f"{value:{'+' if sign and value else ''}.{digits}g}"


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "unknown"
    low, high = f"{min(known):,.0f}", f"{max(known):,.0f}"
    return low if low == high else f"{low} to {high}"


def _count(num: int, what: str) -> str:
    return f"{num:,} {what}{'' if num == 1 else 's'}"
