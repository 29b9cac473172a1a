"""Write the results part of docs/study.md from ``summary``.

The text above its first mark was written by hand before the first run and is never changed. Before
the final pass, a preview of validation scenes is written to the work folder instead.
"""

from collections.abc import Sequence
from pathlib import Path

from study import figures, results, summary
from study.plan import PRIMARY, SEEDS
from study.queue import Place
from study.summary import KINDS, Summary

DOCS = Path(__file__).resolve().parents[3] / "docs"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
CAPTIONS = {
    "accuracy.png": "Accuracy per question type; bars: 95% intervals over the three worlds, "
    "which hold how the worlds differ; differences between arms are paired and narrower.",
    "collapse.png": "KD loss beside spread and rank of the student's tokens; bands: one standard "
    "deviation over runs.",
    "time.png": "Accuracy against training time; building the cache is not in it. Bars: 95% "
    "intervals over the three worlds.",
    "routing.png": "Which expert gets which patches, one run of revised_mole.",
}


def write_report(place: Place, is_final: bool) -> Path:
    """Write figures, tables and ``report.json``; return the page that holds the tables.

    Args:
        place: folders and sizes of the study.
        is_final: read the test file, and write docs/study.md and report.json; otherwise write a
            preview of validation scenes to the work folder.

    Raises:
        SystemExit: the final pass has not run.
    """
    found = summary.summarise(place.results, place.sizes, is_final)
    rows = results.read(place.results, "runs")
    if is_final:
        rows = summary.joined_rows(place.results)
        summary.write(found, place.results)
    folder = DOCS / "study" if is_final else place.work / "preview"
    shown = [row for row in rows if row["seed"] in SEEDS]  # equally many runs per arm
    curves = results.by_run(results.read(place.results, "curves")).values()
    drawn = figures.draw_all(
        folder, shown, "test" if is_final else "val", [c for c in curves if c["seed"] in SEEDS]
    )
    text = results_part(found, [path.name for path in drawn])
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


def constant_sentence(found: dict[str, float]) -> str:
    """Return what an answer without a look at the image reaches."""
    shares = ", ".join(f"{kind} {found[kind]:.3f}" for kind in KINDS)
    return f"The best constant answer per question type scores: {shares}."


def results_part(found: Summary, drawn: Sequence[str]) -> str:
    """Return the tables and figures as Markdown."""
    lines = [
        "Worlds are the units of every interval and p: the mean over the seeds of a world first, "
        "then Student's t over the worlds. The last column of the contrasts takes every pair as a "
        "unit, as the plan did; pairs of one world are not independent, so no claim rests on it. "
        "Where its interval is the wider one, the worlds lie close together by chance.",
        "",
        constant_sentence(found["constant_answers"]),
    ]
    if "test" in found:
        test = found["test"]
        lines += ["", "Accuracy on test scenes, exact match; in brackets 95% intervals.", ""]
        lines += arm_table(test["arms"])
        lines += ["", "### Contrasts"]
        lines += _titled("Primary:", test["primary"])
        lines += _titled("Secondary, corrected for their number (Holm):", test["secondary"])
        lines += _titled(
            "Parts of the recipe, without correction and without a claim:", test["parts"]
        )
        lines += _titled(
            "Asked on 2026-11-29, when the results were known; uncorrected and without a claim:",
            test["afterwards"],
        )
    if "val" in found:
        lines += validation_part(found["val"], with_tests="test" in found)
    for name in drawn:
        lines += ["", f"![{CAPTIONS[name]}]({name})", "", CAPTIONS[name]]
    return "\n".join(lines) + "\n"


def validation_part(val: Summary, with_tests: bool) -> list[str]:
    """Return the tables on validation scenes, on which settings were chosen."""
    lines = ["", "### Validation scenes", ""]
    if with_tests:
        lines += ["Arms that have not answered the test scenes, or not with all their runs.", ""]
    lines += ["Settings were chosen on validation scenes: nothing here is a result.", ""]
    lines += arm_table(val["arms"])
    contrasts = [
        c for family in ("primary", "secondary", "parts", "afterwards") for c in val[family]
    ]
    return lines + _titled("Differences, uncorrected:", contrasts)


def _titled(title: str, contrasts: Sequence[Summary]) -> list[str]:
    return ["", title, "", *contrast_table(contrasts)] if contrasts else []


def arm_table(found: Sequence[Summary]) -> list[str]:
    """Return a line per arm: accuracies, time, and final figures of its tokens and routers."""
    lines = [
        f"| arm | what | runs | worlds | {' | '.join(KINDS)} | seconds | token std | rank | "
        "routing bits |",
        f"|---|---|---|---|{'---|' * len(KINDS)}---|---|---|---|",
    ]
    for arm in found:
        bits = arm["routing_bits"]
        cells = [
            arm["arm"],
            arm["what"],
            str(arm["runs"]),
            ", ".join(map(str, arm["worlds"])),
            *(f"{arm['kinds'][kind]:.3f}" for kind in KINDS[:-1]),
            f"{arm['accuracy']['mean']:.3f}{_range(arm['accuracy'], '.3f')}",
            f"{arm['seconds']:.0f}",
            f"{arm['token_std']:.2f}",
            f"{arm['token_rank']:.2f}",
            ", ".join(f"{b:.2f}" for b in bits) if bits else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def contrast_table(found: Sequence[Summary]) -> list[str]:
    """Return a line per contrast."""
    lines = [
        "| contrast | difference (95%) | per world | df | p | p, Holm | holds | pairs | "
        "over pairs: 95%, p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        name, pooled = c["contrast"], c["pooled_pairs"]
        if c["margin"] is not None:
            name += f" (within {c['margin']:.2f})"
        has_claim = c["p_holm"] is not None or c["contrast"] == PRIMARY.name
        cells = [
            name,
            f"{c['difference']:+.3f}{_range(c, '+.3f')}",
            ", ".join(f"{world:+.3f}" for world in c["worlds"]),
            str(c["df"]) if c["df"] else "-",
            _p(c["p"]),
            _p(c["p_holm"]),
            ("yes" if c["holds"] else "no") if has_claim else "-",
            str(c["pairs"]),
            f"{_range(pooled, '+.3f').strip(' ()')}, {_p(pooled['p'])}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _range(interval: Summary, form: str) -> str:
    """Return the bounds in brackets, or nothing if only one world has rows."""
    if interval["low"] is None:
        return ""
    return f" ({interval['low']:{form}} to {interval['high']:{form}})"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:#.2g}"
