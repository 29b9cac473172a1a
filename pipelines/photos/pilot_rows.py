"""What rows of the pilot hold, and the tables of docs/photos.md that they become.

Input: what commands printed and runs logged. Output: JSON objects, and Markdown.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from movekd.train.step_losses import MAX_OVER_MEDIAN
from study import results

Row = dict[str, Any]
PROBES = ("knn cls", "knn patches", "linear cls", "linear patches")
HEADER = "| arm | kNN [CLS] | kNN patches | linear [CLS] | linear patches |"


def scores(printed: str) -> dict[str, Row]:
    """Return what `movekd probe --json` printed, per model, with short names of the models."""
    found: dict[str, Row] = {}
    for score in json.loads(printed)["scores"]:
        model = str(score["model"])
        kind, _, path = model.rpartition(":")
        name = "base" if kind == "base" else Path(path).stem
        entry = {"accuracy": score["accuracy"], "interval": score["interval"]}
        if score["difference"] is not None:
            entry["minus"] = [score["difference"], *score["difference_interval"]]
        entry = {key: _rounded(value) for key, value in entry.items()}
        found.setdefault(name, {})[f"{score['probe']} {score['feature']}"] = entry
    return found


def training_figures(run: Path, teachers: Sequence[str]) -> Row:
    """Return a run's largest over median KD loss, its first and last losses, and token spread."""
    log = json.loads((run / "log.json").read_text(encoding="utf-8"))
    ends = {
        name: [_rounded(entry[name]) for entry in log if name in entry]
        for name in (*(f"loss_kd_{teacher}" for teacher in teachers), "token_std", "token_rank")
    }
    return {
        "kd_loss_max_over_median": {
            teacher: _rounded(log[-1].get(f"{MAX_OVER_MEDIAN}{teacher}")) for teacher in teachers
        },
        "first_last": {name: [values[0], values[-1]] for name, values in ends.items() if values},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def tables(folder: Path) -> list[str]:
    """Return the lines of the tables: test images, arms minus the first, validation, losses."""
    final, runs = results.read(folder, "final"), results.read(folder, "runs")
    lines = [HEADER, "|---|---|---|---|---|"]
    lines += [
        _line(row["arm"], [_accuracy(row["test"].get(probe)) for probe in PROBES]) for row in final
    ]
    for key in {key: 0 for row in final for key in row if key.startswith("minus_")}:
        first = key.removeprefix("minus_")
        lines += ["", HEADER.replace("arm", f"arm minus `{first}`"), "|---|---|---|---|---|"]
        lines += [
            _line(row["arm"], [_difference(row[key][probe]) for probe in PROBES])
            for row in final
            if key in row
        ]
    lines += ["", HEADER, "|---|---|---|---|---|"]
    for name, found in [("base", runs[0]), *((row["arm"], row) for row in runs)]:
        lines.append(_line(name, [_accuracy(found["val"][name].get(probe)) for probe in PROBES]))
    teachers = list({name: 0 for row in runs for name in row["kd_loss_max_over_median"]})
    lines += ["", "| arm | " + " | ".join(teachers) + " |", "|---|" + "---|" * len(teachers)]
    for row in runs:
        cells = []
        for teacher in teachers:
            if teacher not in row["kd_loss_max_over_median"]:
                cells.append("-")
                continue
            before, after = row["first_last"][f"loss_kd_{teacher}"]
            largest = row["kd_loss_max_over_median"][teacher]
            cells.append(f"{largest:.2f} ({before:.3f} to {after:.3f})")
        lines.append(_line(row["arm"], cells))
    return lines


def _line(arm: str, cells: Sequence[str]) -> str:
    return f"| `{arm}` | " + " | ".join(cells) + " |"


def _accuracy(score: Row | None) -> str:
    if score is None:
        return "-"
    if "minus" in score:
        return f"{score['accuracy']:.3f} ({_difference(score['minus'])})"
    low, high = score["interval"]
    return f"{score['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _difference(difference: Sequence[float]) -> str:
    """Return a difference and its 95% interval."""
    middle, low, high = difference
    return f"{middle:+.3f}, {low:+.3f} to {high:+.3f}"
