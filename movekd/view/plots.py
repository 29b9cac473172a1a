"""Plot the curves of a run, for ``report`` and ``gradio_app``.

Input: a run's log. Output: one matplotlib figure per heading, if the run logged its values.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from movekd.view.run_log import RunLog

_LOSSES = {"loss": "all terms", "loss_text": "text", "loss_kd": "KD", "loss_balance": "balance"}
_COLLAPSE = {"token_std": "standard deviation", "token_rank": "effective rank"}
_ROUTING = re.compile(r"routing_share_(\d{1,6})_(\d{1,6})", re.ASCII)
_SVG: Mapping[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "movekd"}
WIDTH, HEIGHT = 5.6, 3.2
"""Inches of a figure with one panel."""
_MAX_LINES = 40
_MAX_BLOCKS = 120


def run_figures(run: RunLog) -> Iterator[tuple[str, Figure]]:
    """Yield heading and figure of all values that the run logged."""
    yield "Loss", _lines(run, _LOSSES)
    kd = {name: name.removeprefix("loss_kd_") for name in run.names("loss_kd_")}
    weights = {n: n.removeprefix("teacher_weight_") for n in run.names("teacher_weight_")}
    rates = {n: n.removeprefix("learning_rate_") for n in run.names("learning_rate_")}
    panels = {
        "KD loss of each teacher": kd,
        "Weight of each teacher": weights,
        "Learning rate": {"learning_rate": "the other parts" if rates else "learning rate"} | rates,
        "Norm of the gradient": {"grad_norm": "before clipping"},
        "kNN accuracy of the encoder": {
            "eval_knn_cls_accuracy": "[CLS]",
            "eval_knn_patches_accuracy": "mean of patches",
        },
        "Throughput": {"samples_per_second": "samples per second, all processes"},
        "Memory": {"memory_peak_gib": "peak, GiB per process"},
    }
    for heading, names in panels.items():
        if any(run.series(name)[0] for name in names):
            yield heading, _lines(run, names, from_zero=heading in ("Throughput", "Memory"))
    if any(run.series(name)[0] for name in _COLLAPSE):
        yield "Student's tokens: falling curves mean collapse", _collapse(run)
    shares = [n for n in run.names("routing_share_") if _ROUTING.fullmatch(n)]
    if shares:
        yield "Routing: share of tokens per expert, in each block", _routing(run, shares)


def to_svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element, deterministically."""
    file = io.StringIO()
    with mpl.rc_context(dict(_SVG)):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _lines(run: RunLog, names: Mapping[str, str], *, from_zero: bool = False) -> Figure:
    figure = Figure((WIDTH, HEIGHT))
    axes = figure.subplots()
    for at, name in enumerate(list(names)[:_MAX_LINES]):
        for found, label, line in (
            (name, names[name], "-"),
            (f"eval_{name}", f"{names[name]}, held out", "--"),
        ):
            steps, values = run.series(found)
            if steps:
                marker = "o" if len(steps) < 12 else ""
                axes.plot(steps, values, line, color=f"C{at % 10}", label=label, marker=marker)
    finish_axes(axes)
    if from_zero:
        axes.set_ylim(bottom=0)
    if len(axes.lines) > 1:
        axes.legend(fontsize=8)
    elif len(names) == 1:
        axes.set_ylabel(next(iter(names.values())), fontsize=9)
    return figure


def _collapse(run: RunLog) -> Figure:
    """Plot spread and rank of the tokens; if both fall with the KD loss, the student collapses."""
    figure = Figure((WIDTH, HEIGHT))
    axes = figure.subplots()
    for name, at, colour in zip(_COLLAPSE, (axes, axes.twinx()), ("C0", "C1"), strict=True):
        steps, values = run.series(name)
        at.plot(steps, values, color=colour)
        at.set_ylabel(_COLLAPSE[name], color=colour, fontsize=9)
        finite = [value for value in values if math.isfinite(value) and value > 0]
        at.set_ylim(0, 1.15 * max(finite, default=1))
    finish_axes(axes)
    return figure


def _routing(run: RunLog, names: Sequence[str]) -> Figure:
    """Plot the stacked shares of the experts over the steps, one panel per block."""
    of_block: dict[int, dict[int, str]] = {}
    for name in names:
        found = _ROUTING.fullmatch(name)
        if found:
            of_block.setdefault(int(found[1]), {})[int(found[2])] = name
    of_block = dict(sorted(of_block.items())[:_MAX_BLOCKS])
    columns = min(6, len(of_block))
    rows = -(-len(of_block) // columns)
    figure = Figure((2.1 * columns + 0.6, 1.5 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for panel, block in zip(panels, of_block, strict=False):
        experts = sorted(of_block[block])[:_MAX_LINES]
        steps, shares_ET = _common_steps(run, [of_block[block][expert] for expert in experts])
        panel.stackplot(steps, *shares_ET, labels=experts)
        panel.set_title(f"block {block}", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.set_ylim(0, 1)
        panel.margins(x=0)
    for panel in list(panels)[len(of_block) :]:
        panel.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, [f"expert {e}" for e in labels], loc="outside right center", fontsize=8)
    return figure


def _common_steps(run: RunLog, names: Sequence[str]) -> tuple[list[float], list[list[float]]]:
    """Return the steps at which all names were logged, and their values, as stacking needs them."""
    entries = [entry for entry in run.steps if all(name in entry for name in names)]
    return [entry["step"] for entry in entries], [[e[name] for e in entries] for name in names]


def finish_axes(axes: Any, x: str = "optimizer step") -> None:
    """Give the axes of a figure the labels and the grid that all have."""
    axes.set_xlabel(x, fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.02)
