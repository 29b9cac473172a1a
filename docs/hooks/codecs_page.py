"""Write the tables and the figure of docs/codecs.md from the committed figures.

Input: ``report.json`` of the comparison of codecs, the rows of the pilot on photographs,
``curve.json``, and the totals of docs/scaling.md, which follow from `movekd cache plan`. The text
between the marks is replaced; the rest of the page is written by hand. `make codecs` runs this
module; a test compares the page with it.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE, FIGURE = DOCS / "codecs.md", DOCS / "images" / "codecs.png"
PROBES = ("linear patches", "linear cls", "knn patches", "knn cls")
REFERENCE = "full"
"""The arm of the pilot that distils from int8; ``full_CODEC`` are those of other codecs."""
PILOT_TEACHERS = ("vit_s", "efficientnet_lite0")
GRADIENTS = ("untrained", "half", "trained")

Found = dict[str, Any]


def codecs_page() -> str:
    """Return the page with all its tables written anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in PARTS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n\n" + "\n".join(lines()) + f"\n\n{end}{after}"
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def read_study() -> Found:
    """Return the figures of the comparison of codecs."""
    found: Found = json.loads((RESULTS / "codecs" / "report.json").read_text(encoding="utf-8"))
    return found


def study_part() -> list[str]:
    """Return a line per codec of the study on handwriting."""
    found = read_study()
    is_final = found["part"] == "test"
    rows = []
    float16 = found["codecs"][0]
    for codec, contrast in zip(found["codecs"], [None, *found["contrasts"]], strict=True):
        rows.append(
            [
                f"`{codec['codec']}`",
                f"{codec['row_bytes']:,}",
                f"{codec['token_bytes'] / float16['token_bytes']:.3f}",
                f"{codec['energy_error']['mean']:.2%}",
                f"{codec['accuracy']['mean']:.3f}",
                *(_contrast(contrast, is_final) if contrast else "----"),
            ]
        )
    header = [
        *("codec", "bytes per image", "tokens, of float16", "energy error", "accuracy"),
        *("minus float16 (95% over worlds)", "per world", "95% over pairs"),
        "p; equal within a point",
    ]
    scenes = f"{found['num_questions']:,} questions per world"
    if is_final:
        what = f"Test scenes, {scenes}; {float16['runs']} runs of each codec, in three worlds."
    else:
        what = (
            f"**Not a result**: validation scenes, {scenes}, and {len(found['seeds'])} of 8 seeds. "
            "The answers about test scenes are read when all runs have them."
        )
    return [what, "", *_table(header, rows)]


def _contrast(contrast: Found, is_final: bool) -> list[str]:
    pairs = contrast["pooled_pairs"]
    claim = "yes" if contrast["claimed"] else "not shown"
    return [
        f"{_points(contrast['difference'])} ({_ends(contrast)})",
        ", ".join(map(_points, contrast["worlds"])),
        _ends(pairs),
        f"{contrast['p']:#.2g}; {claim}" if is_final else "-",
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _ends(interval: Found) -> str:
    return f"{_points(interval['low'])} to {_points(interval['high'])}"


def read_pilot() -> tuple[Found, dict[str, Found]]:
    """Return the pilot's arm in int8, and those of other codecs by name, from test images."""
    lines = (RESULTS / "pilot" / "final.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["arm"]: row for row in map(json.loads, lines)}
    codecs = {row["codec"] for row in read_curve()}
    others = {
        name.removeprefix(f"{REFERENCE}_"): row
        for name, row in rows.items()
        if name.removeprefix(f"{REFERENCE}_") in codecs
    }
    return rows[REFERENCE], others


def pilot_share(codec: str) -> float:
    """Return the bytes of the tokens of the pilot's teachers in a codec, over float16."""
    sizes = {
        (row["teacher"], row["codec"]): row["row_bytes"]
        for row in read_curve()
        if row["what"] == "photographs" and "refused" not in row
    }
    own, float16 = (sum(sizes[t, c] for t in PILOT_TEACHERS) for c in (codec, "float16"))
    return float(own / float16)


def photographs_part() -> list[str]:
    """Return a line per codec of the pilot on photographs."""
    reference, others = read_pilot()
    accuracy = [f"{reference['test'][probe]['accuracy']:.3f}" for probe in PROBES]
    rows = [["`int8`", f"{pilot_share('int8'):.3f}", *accuracy]]
    for codec, row in others.items():
        cells = []
        for probe in PROBES:
            middle, low, high = row[f"minus_{REFERENCE}"][probe]
            cells.append(f"{_points(middle)} ({_points(low)} to {_points(high)})")
        rows.append([f"`{codec}`", f"{pilot_share(codec):.3f}", *cells])
    return _table(["codec", "tokens, of float16", *PROBES], rows)


def read_curve() -> list[Found]:
    """Return the rows of curve.json."""
    rows: list[Found] = json.loads((RESULTS / "curve.json").read_text(encoding="utf-8"))["rows"]
    return rows


def curve_part() -> list[str]:
    """Return a table for each kind of images, with a line per teacher and codec."""
    whole = read_curve()
    lines: list[str] = []
    for what in ("photographs", "handwriting"):
        title = f"{what.capitalize()}:"
        lines += ["", title, "", *_curve_table([row for row in whole if row["what"] == what])]
    return lines[1:]


def _curve_table(found: Sequence[Found]) -> list[str]:
    rows = []
    for row in found:
        cosines = row.get("gradient_cosine", {})
        if "refused" in row or row["codec"] == "float16":
            continue
        rows.append(
            [
                *(f"`{row['teacher']}`", f"`{row['codec']}`", f"{row['row_bytes'] / 1e3:.1f}"),
                *(f"{row['over_float16']:.3f}", f"{row['energy_error']:.3%}"),
                f"{row['token_error']:.1%}",
                *(f"{cosines[n]['mean']:.4f}" if n in cosines else "-" for n in GRADIENTS),
            ]
        )
    names = [f"gradient, {name}" for name in GRADIENTS]
    header = ["teacher", "codec", "KB per image", "of float16", "energy", "token", *names]
    return _table(header, rows)


def sizes_part() -> list[str]:
    """Return the totals of the paper's four teachers and 558,000 images on the student's grid."""
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| all, (\w+), (own grids|24x24) \| [\d.]+ \| ([\d.]+) \|", page, re.M)
    totals = {(codec, grid): float(total) for codec, grid, total in found}
    codecs = sorted({codec for codec, _ in totals}, key=lambda codec: -totals[codec, "24x24"])
    rows = [
        [f"`{codec}`", f"{totals[codec, 'own grids']:.2f}", f"{totals[codec, '24x24']:.2f}"]
        for codec in codecs
    ]
    return _table(["codec", "own grids, TB", "24x24, TB"], rows)


PARTS: dict[str, Callable[[], list[str]]] = {
    "study": study_part,
    "photographs": photographs_part,
    "curve": curve_part,
    "sizes": sizes_part,
}


def draw() -> None:
    """Draw bytes per image against accuracy, with 95% intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    found = read_study()
    float16 = found["codecs"][0]["token_bytes"]
    points = [
        (codec["codec"], codec["token_bytes"] / float16, c["difference"], c["low"], c["high"])
        for codec, c in zip(found["codecs"][1:], found["contrasts"], strict=True)
    ]
    part = "test scenes" if found["part"] == "test" else "validation scenes, not complete"
    _panel(panels[0], points, f"handwriting: answers, {part}", "accuracy minus float16, points")
    panels[0].axhspan(-1, 1, color="#2ca02c", alpha=0.08)
    probe = PROBES[0]
    pilot = [
        (codec, pilot_share(codec), *row[f"minus_{REFERENCE}"][probe])
        for codec, row in read_pilot()[1].items()
    ]
    title = "photographs: linear probe on patches, one seed"
    _panel(panels[1], pilot, title, "accuracy minus int8, points")
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _panel(axes: Any, points: Sequence[tuple[str, float, float, float, float]], *text: str) -> None:
    for name, share, middle, low, high in points:
        down, up = 100 * (middle - low), 100 * (high - middle)
        axes.errorbar(share, 100 * middle, yerr=[[down], [up]], fmt="o", color="#1f77b4", capsize=3)
        place = {"xytext": (-2, 5), "textcoords": "offset points", "fontsize": 8, "rotation": 60}
        axes.annotate(name, (share, 100 * high), **place)
    axes.set_title(text[0], fontsize=10)
    axes.set_ylabel(text[1])
    axes.set_xscale("log")
    axes.set_xlim(0.03, 0.7)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.22 * (high - low))  # for the names
    ticks = (0.04, 0.07, 0.13, 0.25, 0.5)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("bytes of the tokens of an image, over float16")
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    PAGE.write_text(codecs_page(), encoding="utf-8")
    draw()
