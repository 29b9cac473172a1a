"""Every figure on the twelve worlds in README and docs/twelve-worlds.md is in their report."""

import json
from pathlib import Path
from typing import Any

import pytest

from quoted_figures import DECIMAL, decimals, ends, intervals, points
from study import results, summary
from study.page import END

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/twelve-worlds.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = json.loads((results.TWELVE_RESULTS / summary.REPORT).read_text(encoding="utf-8"))
MAIN = REPORT["main"]
CLAIMS: dict[str, dict[str, Any]] = {c["contrast"]: c for c in MAIN["claims"]}
CONTRASTS: dict[str, dict[str, Any]] = CLAIMS | {c["contrast"]: c for c in MAIN["others"]}
ARMS = {arm["arm"]: arm["accuracy"]["mean"] for arm in MAIN["arms"]}
README_ROWS = (
    "revised_mole - none_mole",
    "revised_mole - revised_full",
    "revised_mole - official_tuned",
    "per_teacher - revised_mole",
    "revised_full - none_mole",
    "official_tuned - none_mole",
    "official_tuned - official_released",
)


def evidence() -> str:
    return README.split("## Does it help?")[1].split("\n## ")[0]


def in_words() -> str:
    return PAGE.split(END)[1]


def test_the_table_of_the_readme_is_the_report() -> None:
    lines = [line for line in evidence().splitlines() if line.startswith("|")]
    assert f"constant answers score {points(MAIN['constant_answers']['all'])}." in evidence()
    for line, name in zip(lines[2:], README_ROWS, strict=True):
        what, difference, p, verdict = (cell.strip() for cell in line.strip("|").split("|"))
        found = CONTRASTS[name]
        assert intervals(difference)[0] in ends(found), name
        assert points(found["difference"]) == difference.split(" ")[0].lstrip("+")
        accuracies = ", ".join(points(ARMS[arm]) for arm in name.split(" - "))
        assert f"({accuracies})" in what
        if name in CLAIMS:
            assert p == decimals(found["p"])
            assert verdict == ("yes" if found["claimed"] else "no")
        else:
            assert (p, verdict) == ("-", "not tested")


@pytest.mark.parametrize("text", [in_words(), evidence()], ids=["twelve-worlds.md", "README"])
def test_every_figure_in_words_is_in_the_report(text: str) -> None:
    looks = [
        *(c for found in MAIN["unseen"].values() for c in found["contrasts"]),
        *(c for found in MAIN["probe"].values() for c in found["contrasts"]),
    ]
    rest = REPORT["rest"] or {"parts": [], "others": []}
    known = [*CONTRASTS.values(), *looks, *rest["parts"], *rest["others"]]
    over_worlds = {end for contrast in known for end in ends(contrast)}
    quoted = intervals(text)
    assert quoted
    assert set(quoted) <= over_worlds
    allowed = {figure.lstrip("-") for end in over_worlds for figure in end}
    allowed |= {points(a) for a in (*ARMS.values(), MAIN["constant_answers"]["all"])}
    allowed |= {decimals(c["p"]) for c in CLAIMS.values()}
    assert set(DECIMAL.findall(text)) <= allowed
