"""The results part of docs/study.md, made from the files of rows.

What stands above its first mark was written by hand before the first run and is never touched.
Without the final pass there is nothing to put there: a preview over validation scenes goes to the
work folder instead.
"""

from collections.abc import Sequence
from pathlib import Path

from study import figures, results
from study.plan import (
    PRIMARY,
    SECONDARY,
    SECONDARY_MORE,
    SEEDS,
    STUDY,
    Arm,
    Contrast,
    arms,
)
from study.queue import Place
from study.results import Row
from study.statistics import Comparison, accuracies, compare, holm, interval

DOCS = Path(__file__).resolve().parents[3] / "docs"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def write_report(place: Place, is_final: bool) -> Path:
    """Write tables and figures; return the page that holds them.

    Args:
        place: the study's.
        is_final: read the test file, and write into docs/study.md; otherwise validation scenes
            alone, and a preview in the work folder.

    Raises:
        SystemExit: the final pass has not been run.
    """
    rows, curves = results.read(place.results, "runs"), results.read(place.results, "curves")
    part = "val"
    if is_final:
        tested = results.by_run(results.read(place.results, "final"))
        if not tested:
            raise SystemExit("study: the test scenes have not been looked at; `final` does.")
        rows = [row | tested[run] for run, row in results.by_run(rows).items() if run in tested]
        part = "test"
    if not rows:
        raise SystemExit(f"study: {place.results}/runs.jsonl holds no row; run the study first.")
    folder = DOCS / "study" if is_final else place.work / "preview"
    shown = [row for row in rows if row["seed"] in SEEDS]  # as many runs of every arm
    curves = [c for c in results.by_run(curves).values() if c["seed"] in SEEDS]
    drawn = figures.draw_all(folder, shown, part, curves)
    text = results_part(rows, part, [path.name for path in drawn])
    if not is_final:
        page = folder / "preview.md"
        page.write_text(text, encoding="utf-8")
        return page
    page = DOCS / "study.md"
    whole = page.read_text(encoding="utf-8")
    before, after = whole[: whole.index(BEGIN)], whole[whole.index(END) :]
    text = text.replace("](", "](study/")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{after}", encoding="utf-8")
    return page


def results_part(rows: Sequence[Row], part: str, drawn: Sequence[str]) -> str:
    """Return the tables and figures as Markdown."""
    values = accuracies(rows, part)
    scenes = "test" if part == "test" else "validation"
    lines = [f"Accuracy on {scenes} scenes, exact match; 95% intervals over runs.", ""]
    lines += arm_table([row for row in rows if row["seed"] in SEEDS], part)
    lines += ["", "### Contrasts", ""]
    primary = compare(PRIMARY, values)
    if primary is not None:
        lines += ["Primary:", "", *contrast_table([primary])]
    found = [c for c in (compare(c, values) for c in (*SECONDARY, *SECONDARY_MORE)) if c]
    if found:
        lines += ["", "Secondary, corrected for their number (Holm):", ""]
        lines += contrast_table(holm(found))
    others = [c for c in (compare(c, values) for c in parts_of_the_recipe(rows)) if c]
    if others:
        lines += ["", "The rest, without correction and without a claim:", ""]
        lines += contrast_table(others)
    captions = {
        "accuracy.png": "Accuracy a question type.",
        "collapse.png": "KD loss beside spread and rank of the student's tokens; bands: one "
        "standard deviation over runs.",
        "time.png": "Accuracy against training time; building the cache is not in it.",
        "routing.png": "Which expert gets which patches, one run of revised_mole.",
    }
    for name in drawn:
        lines += ["", f"![{captions[name]}]({name})", "", captions[name]]
    return "\n".join(lines) + "\n"


def parts_of_the_recipe(rows: Sequence[Row]) -> list[Contrast]:
    """Return the contrasts of `make study-full` that nothing is claimed about."""
    planned = {c.name for c in (PRIMARY, *SECONDARY, *SECONDARY_MORE)}
    present = {row["arm"] for row in rows}
    base = {"official_full": "revised_full", "shuffled_full": "revised_full"}
    base |= {f"only_{teacher}": "minus_attention" for teacher in ("clip", "eva", "convnext", "sam")}
    contrasts = [
        Contrast(base.get(arm.name, "revised_mole"), arm.name)
        for arm in arms(everything=True)
        if arm.name in present and arm not in STUDY and arm.matches_time_of is None
    ]
    return [c for c in contrasts if c.name not in planned and c.first != c.second]


def arm_table(rows: Sequence[Row], part: str) -> list[str]:
    """Return one line an arm: accuracies, time, and what its tokens and routers ended with."""
    kinds = figures.KINDS
    lines = [
        f"| arm | what | runs | {' | '.join(kinds)} | seconds | token std | rank | routing bits |",
        f"|---|---|---|{'---|' * len(kinds)}---|---|---|---|",
    ]
    for arm in arms(everything=True):
        runs = [row for row in rows if row["arm"] == arm.name]
        if runs:
            lines.append(_arm_line(arm, runs, part))
    return lines


def _arm_line(arm: Arm, runs: Sequence[Row], part: str) -> str:
    cells = [arm.name, arm.what, str(len(runs))]
    for kind in figures.KINDS:
        found = interval(list(accuracies(runs, part, kind).values()))
        cells.append(str(found) if kind == "all" else f"{found.mean:.3f}")
    cells.append(
        f"{_mean([r['cpu_seconds']['pretrain'] + r['cpu_seconds']['finetune'] for r in runs]):.0f}"
    )
    for name in ("token_std", "token_rank"):
        cells.append(f"{_mean([r[name][1] for r in runs]):.2f}")
    bits = [r["routing"] for r in runs if "routing" in r]
    cells.append(
        ", ".join(f"{_mean([b[name] for b in bits]):.2f}" for name in ("digit_bits", "place_bits"))
        if bits
        else "-"
    )
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def contrast_table(found: Sequence[Comparison]) -> list[str]:
    """Return one line a contrast."""
    lines = [
        "| contrast | pairs | difference (95%) | a world | over worlds (95%) | p | p by signs | "
        "corrected | holds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        name = c.contrast.name
        if c.contrast.margin is not None:
            name += f" (within {c.contrast.margin:.2f})"
        over = f"{c.over_worlds.low:+.3f} to {c.over_worlds.high:+.3f}"
        cells = [
            name,
            str(c.difference.num),
            f"{c.difference.mean:+.3f} ({c.difference.low:+.3f} to {c.difference.high:+.3f})",
            ", ".join(f"{world:+.3f}" for world in c.worlds),
            over,
            f"{c.p:.2g}",
            "-" if c.p_signs is None else f"{c.p_signs:.2g}",
            "-" if c.corrected is None else f"{c.corrected:.2g}",
            "yes" if c.holds else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
