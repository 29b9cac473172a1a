"""Every figure on the first study in docs/study.md is in its report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quoted_figures import DECIMAL, decimals, ends, intervals, points
from study import page, results, summary

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/study.md").read_text(encoding="utf-8")
REPORT = json.loads((results.RESULTS / summary.REPORT).read_text(encoding="utf-8"))
CONTRASTS: dict[str, dict[str, Any]] = {
    c["contrast"]: c
    for part in ("test", "val")
    for family in ("primary", "secondary", "parts", "afterwards")
    for c in REPORT[part][family]
}
ARMS = {arm["arm"]: arm["accuracy"]["mean"] for arm in REPORT["test"]["arms"]}
SETTINGS = {"0.5", "12.5"}
"""Decimals of `In words` that are not results: a KD weight, and a share of test_start."""
OVER_WORLDS = {e for c in CONTRASTS.values() for e in ends(c)}
OVER_PAIRS = {e for c in CONTRASTS.values() for e in ends(c["pooled_pairs"])}


def said() -> tuple[str, str]:
    """Return what the page says in words: what holds, and what it takes back."""
    holds, back = PAGE.split("## In words")[1].split("### Taken back on 2026-11-29")
    return holds.replace("\n  ", " "), back


def test_the_results_part_is_the_committed_report() -> None:
    drawn = [name for name in page.CAPTIONS if (ROOT / "docs/study" / name).exists()]
    text = page.results_part(REPORT, drawn).replace("](", "](study/")
    assert PAGE.split(page.BEGIN)[1].split(page.END)[0] == f"\n\n{text}\n"


def test_every_figure_in_words_is_in_the_report() -> None:
    text = said()[0]
    found = intervals(text)
    # one interval is over pairs: that of the contrast whose worlds lie closer than its seeds
    assert set(found) <= OVER_WORLDS
    assert len(found) > 7
    allowed = {figure.lstrip("-") for e in OVER_WORLDS for figure in e} | SETTINGS
    allowed |= {
        figure.lstrip("-")
        for e in ends(CONTRASTS["revised_mole - float16"]["pooled_pairs"])
        for figure in e
    }
    allowed |= {
        points(accuracy) for accuracy in (*ARMS.values(), REPORT["constant_answers"]["all"])
    }
    allowed |= {f"{a:.3f}"[1:] for a in (*ARMS.values(), REPORT["constant_answers"]["all"])}
    allowed |= {decimals(c[key]) for c in CONTRASTS.values() for key in ("p", "p_holm") if c[key]}
    assert set(DECIMAL.findall(text)) <= allowed


def test_what_is_taken_back_is_named_with_both_figures() -> None:
    rows = [line.strip("|").split("|") for line in said()[1].splitlines() if line.startswith("|")]
    for old, new in rows[2:]:
        assert set(intervals(old)) <= OVER_PAIRS
        assert set(intervals(new)) <= OVER_WORLDS
    assert len(rows) > 12


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "docs/concepts.md",
        "docs/index.md",
        "docs/quickstart.md",
        "pipelines/digits/README.md",
    ],
)
def test_no_page_repeats_what_was_taken_back(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not re.search(
        r"6e-9|unseen\s+handwriting|handwriting\s+that\s+(no\s+model|nobody)", text
    )
