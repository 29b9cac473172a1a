"""Plot the figures of docs/study.md.

Input: rows and curves. Output: PNG files. An arm has the same colour in all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from scenes import NUM_CLASSES
from study.plan import MORE, STUDY
from study.results import Row
from study.statistics import accuracies, over_worlds
from study.summary import KINDS

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = dict(
    zip(
        [arm.name for arm in STUDY],
        ("#7a7a7a", "#1f77b4", "#bdb76b", "#2ca02c", "#d62728", "#9467bd"),
        strict=True,
    )
)


def draw_all(folder: Path, rows: Sequence[Row], part: str, curves: Sequence[Row]) -> list[Path]:
    """Write every figure that the rows allow; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [row for row in rows if row["arm"] in COLOURS]
    shown = [name for name in COLOURS if any(row["arm"] == name for row in runs)]
    drawn = [
        (folder / "accuracy.png", _accuracy(runs, part, shown)),
        (folder / "collapse.png", _collapse(curves, shown)),
        (folder / "time.png", _time(rows, part)),
    ]
    routed = [c for c in curves if c["arm"] == "revised_mole" and "routing" in c]
    if routed:
        drawn.append((folder / "routing.png", _routing(routed[0])))
    for path, figure in drawn:
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return [path for path, _ in drawn]


def _accuracy(rows: Sequence[Row], part: str, shown: Sequence[str]) -> Any:
    """Plot mean and 95% interval over worlds per question type."""
    figure, axes = plt.subplots(figsize=(9, 4))
    for at, name in enumerate(shown):
        intervals = [
            over_worlds(accuracies([r for r in rows if r["arm"] == name], part, kind))
            for kind in KINDS
        ]
        places = np.arange(len(KINDS)) + (at - (len(shown) - 1) / 2) * 0.12
        means = np.array([i.mean for i in intervals])
        errors = [means - [i.low for i in intervals], [i.high for i in intervals] - means]
        style = {"color": COLOURS[name], "label": name, "capsize": 2, "markersize": 5}
        axes.errorbar(places, means, np.where(np.isfinite(errors), errors, 0), fmt="o", **style)
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set_ylabel(f"accuracy on {'test' if part == 'test' else 'validation'} scenes")
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _collapse(curves: Sequence[Row], shown: Sequence[str]) -> Any:
    """Plot KD loss, spread and effective rank of the tokens over the steps of both stages."""
    names = ("loss_kd", "token_std", "token_rank")
    labels = ("KD loss", "token standard deviation", "effective rank of the tokens")
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6))
    for panel, name, label in zip(panels, names, labels, strict=True):
        for arm in shown:
            lines = [_line(c, name) for c in curves if c["arm"] == arm and name in c["finetune"]]
            if not lines:
                continue
            steps, values = lines[0][0], np.array([y for _, y in lines])
            panel.plot(steps, values.mean(0), color=COLOURS[arm], label=arm)
            spread = values.std(0)
            panel.fill_between(
                steps,
                values.mean(0) - spread,
                values.mean(0) + spread,
                color=COLOURS[arm],
                alpha=0.15,
                linewidth=0,
            )
        panel.set_xlabel("step (stage 1, then stage 2)")
        panel.set_title(label, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    lines, arms = panels[1].get_legend_handles_labels()
    if lines:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        figure.legend(lines, arms, fontsize=8, ncols=len(lines), **below)
    return figure


def _line(curves: Row, name: str) -> tuple[list[float], list[float]]:
    first, second = curves["pretrain"], curves["finetune"]
    steps = [*first["step"], *(first["step"][-1] + step for step in second["step"])]
    return steps, [*first[name], *second[name]]


def _time(rows: Sequence[Row], part: str) -> Any:
    """Plot accuracy against training time, a point per arm of the study and per timed arm."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    timed = [arm.name for arm in MORE if arm.matches_time_of]
    for name in (*COLOURS, *timed):  # more points would overlap
        runs = [row for row in rows if row["arm"] == name]
        if not runs:
            continue
        seconds = float(
            np.mean([r["cpu_seconds"]["pretrain"] + r["cpu_seconds"]["finetune"] for r in runs])
        )
        accuracy = over_worlds(accuracies(runs, part))
        half = accuracy.high - accuracy.mean
        colour = COLOURS.get(name, "#333333")
        axes.errorbar(
            seconds,
            accuracy.mean,
            yerr=half if np.isfinite(half) else 0,
            fmt="o",
            color=colour,
            capsize=2,
        )
        axes.annotate(
            name,
            (seconds, accuracy.mean),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    axes.margins(x=0.2)  # space for the names
    axes.set_xlabel("seconds of training on one thread")
    axes.set_ylabel(f"accuracy on {'test' if part == 'test' else 'validation'} scenes")
    axes.grid(alpha=0.3)
    return figure


def _routing(curves: Row) -> Any:
    """Plot which expert gets which digit, and which place, in each layer of a run."""
    digit_LEC = np.array(curves["routing"]["digit"], float)
    place_LEC = np.array(curves["routing"]["place"], float)
    digit_LEC /= digit_LEC.sum(1, keepdims=True).clip(min=1)
    place_LEC /= place_LEC.sum(1, keepdims=True).clip(min=1)
    layers, experts, _ = digit_LEC.shape
    figure, panels = plt.subplots(
        layers,
        1 + experts,
        figsize=(9, 1.7 * layers),
        squeeze=False,
        width_ratios=[3, *[1] * experts],
        layout="constrained",
    )
    style: Mapping[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    labels = [*map(str, range(NUM_CLASSES - 1)), "none"]
    for layer, row in enumerate(panels):
        image = row[0].imshow(digit_LEC[layer], aspect="auto", **style)
        row[0].set_xticks(range(NUM_CLASSES), labels if layer == layers - 1 else [])
        row[0].set_yticks(range(experts))
        row[0].set_ylabel(f"block {layer}\nexpert", fontsize=8)
        for expert in range(experts):
            row[1 + expert].imshow(place_LEC[layer, expert].reshape(6, 6), **style)
            row[1 + expert].set_xticks([])
            row[1 + expert].set_yticks([])
            if layer == 0:
                row[1 + expert].set_title(f"expert {expert}", fontsize=9)
    panels[0][0].set_title("share of each digit's patches", fontsize=9)
    panels[-1][1].set_xlabel("share by place", fontsize=8)
    figure.colorbar(image, ax=panels, shrink=0.4)
    return figure
