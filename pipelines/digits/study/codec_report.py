"""Write the results part of docs/codecs.md: bytes per image against accuracy on test scenes.

Input: the rows of the comparison of codecs. Output: ``report.json`` beside them, a table between
the marks of the page.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from study import results
from study.page import DOCS
from study.plan import CODEC_ARMS, CODEC_CONTRASTS, Arm, runs
from study.queue import Place
from study.results import Row
from study.statistics import accuracies, compare, over_worlds
from study.summary import REPORT, Summary, contrast_figures, write

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"


def summarise(folder: Path) -> Summary:
    """Return all figures of the comparison.

    Raises:
        SystemExit: some runs have not answered the test scenes yet.
    """
    rows = joined_rows(folder)
    float16 = _sizes(rows, CODEC_ARMS[0])
    values = accuracies(rows, "test")
    codecs = []
    for arm in CODEC_ARMS:
        mine = [row for row in rows if row["arm"] == arm.name]
        accuracy = over_worlds(accuracies(mine, "test"))
        sizes = _sizes(rows, arm)
        codecs.append(
            {
                "codec": arm.what,
                "runs": len(mine),
                "bytes_per_image": sizes["row_bytes"],
                "token_bytes_over_float16": round(sizes["token_bytes"] / float16["token_bytes"], 4),
                "energy_error": _worst_energy(mine),
                "accuracy": {
                    "mean": round(accuracy.mean, 6),
                    "low": round(accuracy.low, 6),
                    "high": round(accuracy.high, 6),
                },
            }
        )
    contrasts, is_open = [], True
    for contrast in CODEC_CONTRASTS:
        found = compare(contrast, values)
        assert found is not None, f"{contrast.name} has rows"
        is_open = is_open and found.holds
        contrasts.append(contrast_figures(found) | {"claimed": is_open})
    questions = rows[0]["test"]["all"][1]
    return {"unit": "world", "num_questions": questions, "codecs": codecs, "contrasts": contrasts}


def joined_rows(folder: Path) -> list[Row]:
    """Return the rows of all runs with their test answers.

    Raises:
        SystemExit: some are missing.
    """
    learned = results.by_run(results.read(folder, "runs"))
    tested = results.by_run(results.read(folder, "final"))
    missing = [run for run in runs(CODEC_ARMS) if run not in tested]
    if missing:
        raise SystemExit(
            f"study: {len(missing)} runs have not answered the test scenes ({missing[0]}, ...); "
            "run `study run --codecs` and `study final --codecs` first."
        )
    return [learned[run] | tested[run] for run in runs(CODEC_ARMS)]


def _sizes(rows: Sequence[Row], arm: Arm) -> dict[str, int]:
    """Return bytes per image over all teachers; every world has the same."""
    caches = [row["cache"] for row in rows if row["arm"] == arm.name]
    sizes = [
        {name: sum(teacher[name] for teacher in cache.values()) for name in _SIZES}
        for cache in caches
    ]
    assert all(size == sizes[0] for size in sizes), f"{arm.name} has rows of several sizes"
    return sizes[0]


_SIZES = ("row_bytes", "token_bytes")


def _worst_energy(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean over teachers and worlds of the sealed energy errors, and the largest."""
    errors = [t["error_energy"] for row in rows for t in row["cache"].values()]
    return {"mean": float(f"{np.mean(errors):.4g}"), "largest": max(errors)}


def write_report(place: Place) -> Path:
    """Write ``report.json`` and the table of docs/codecs.md; return the page."""
    found = summarise(place.results)
    write(found, place.results)
    page = DOCS / "codecs.md"
    whole = page.read_text(encoding="utf-8")
    before, after = whole[: whole.index(BEGIN)], whole[whole.index(END) :]
    text = "\n".join(table(found))
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{after}", encoding="utf-8")
    return page


def read_report(folder: Path = results.CODEC_RESULTS) -> Summary:
    """Return the committed figures."""
    report: Summary = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report


def table(found: Summary) -> list[str]:
    """Return a line per codec."""
    lines = [
        "| codec | bytes per image | of float16, tokens | energy error | accuracy | minus float16 "
        "| per world | p, worlds | over pairs: 95%, p | equal within a point |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    contrasts = [None, *found["contrasts"]]
    for codec, contrast in zip(found["codecs"], contrasts, strict=True):
        accuracy, energy = codec["accuracy"], codec["energy_error"]
        cells = [
            f"`{codec['codec']}`",
            f"{codec['bytes_per_image']:,}",
            f"{codec['token_bytes_over_float16']:.3f}",
            f"{energy['mean']:.2%}",
            f"{accuracy['mean']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})",
        ]
        if contrast is None:
            cells += ["-"] * 5
        else:
            pairs = contrast["pooled_pairs"]
            cells += [
                f"{_signed(contrast)}",
                ", ".join(f"{world:+.4f}" for world in contrast["worlds"]),
                f"{contrast['p']:#.2g}",
                f"{pairs['low']:+.4f} to {pairs['high']:+.4f}, {pairs['p']:#.2g}",
                "yes" if contrast["claimed"] else "not shown",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _signed(contrast: Summary) -> str:
    return f"{contrast['difference']:+.4f} ({contrast['low']:+.4f} to {contrast['high']:+.4f})"
