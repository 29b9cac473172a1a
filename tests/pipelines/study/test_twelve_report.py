"""The report of twelve worlds: claims in their order, and figures that SciPy gives, too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from study import plan_twelve, results, summary, twelve_page, twelve_report
from study.page import BEGIN, END
from study.plan import RunId, runs
from study.plan_twelve import ARMS, MAIN_ARMS
from study.summary import KINDS
from study.twelve_page import points
from study.twelve_report import PROBES, UNSEEN_LOOKS, mixed_model

NUM = 2048
BETTER = {"revised_mole": 0.05, "revised_full": 0.05, "official_tuned": 0.02, "per_teacher": 0.05}
"""What each arm of the made rows has more than no teachers; all others nothing."""


def made_rows(folder: Path, better: Mapping[str, float], spread: float = 0.003) -> None:
    """Write rows of all planned runs whose accuracies differ by ``better`` and a little noise."""
    draw = np.random.default_rng(0)
    for run in runs(ARMS):
        share = 0.5 + 0.01 * (run.world % 3) + better.get(run.arm, 0.0) + draw.normal(0, spread)
        right = {kind: [round(NUM * share), NUM] for kind in KINDS}
        name: dict[str, Any] = {"arm": run.arm, "world": run.world, "seed": run.seed}
        about = {
            "cpu_seconds": {"pretrain": 20.0, "finetune": 40.0},
            "token_std": [1.0, 2.0],
            "token_rank": [50.0, 60.0],
        }
        results.append(folder, "runs", {**name, **about, "val": right})
        more: dict[str, Any] = {}
        if run.arm in {arm.name for arm in MAIN_ARMS}:
            more = dict.fromkeys(UNSEEN_LOOKS, right)
            more["probe"] = dict.fromkeys(PROBES, right["all"])
        results.append(folder, "final", {**name, "test": right, **more})


def outcomes(found):
    return [(c["outcome"], c["claimed"]) for c in found["main"]["claims"]]


def test_equality_lets_the_next_test_begin_and_the_first_open_one_ends_the_claims(tmp_path):
    made_rows(tmp_path, BETTER)
    found = twelve_report.summarise(tmp_path)
    assert outcomes(found) == [
        ("better", True),
        ("equal", True),
        ("better", True),
        ("open", False),
    ]
    main, rest = found["main"], found["rest"]
    assert main["claims"][1]["p_equal"] < 0.05
    assert main["claims"][2]["p_equal"] is None
    assert (main["part"], main["worlds"]) == ("test", list(plan_twelve.WORLDS))
    assert (rest["part"], rest["worlds"]) == ("test", list(plan_twelve.PART_WORLDS))
    assert [arm["arm"] for arm in (*main["arms"], *rest["arms"])] == [arm.name for arm in ARMS]
    for figures, num_runs, num_worlds in ((main, 24, 12), (rest, 8, 8)):
        assert {arm["runs"] for arm in figures["arms"]} == {num_runs}
        assert {len(arm["worlds"]) for arm in figures["arms"]} == {num_worlds}
    contrasts = [*rest["parts"], *rest["others"]]
    assert len(contrasts) == len(plan_twelve.PART_CONTRASTS) + len(plan_twelve.OTHER_CONTRASTS)
    assert {c["pairs"] for c in contrasts} == {8}
    assert {c["pairs"] for c in main["others"]} == {24}
    assert not any("claimed" in c for c in (*contrasts, *main["others"]))
    assert main["probe"]["linear cls"]["arms"]["revised_mole"]["mean"] == pytest.approx(
        0.56, abs=2e-3
    )


def test_a_loss_is_a_result_and_a_primary_test_without_one_ends_everything(tmp_path):
    made_rows(tmp_path / "worse", {**BETTER, "revised_mole": 0.03})
    found = twelve_report.summarise(tmp_path / "worse")
    assert outcomes(found) == [
        ("better", True),
        ("worse", True),
        ("better", True),
        ("better", True),
    ]
    made_rows(tmp_path / "nothing", {}, spread=0.02)
    found = twelve_report.summarise(tmp_path / "nothing")
    assert outcomes(found)[0] == ("open", False)
    assert not any(claimed for _, claimed in outcomes(found))


def test_tests_are_scipys_over_the_means_of_the_worlds(tmp_path):
    made_rows(tmp_path, BETTER)
    found = twelve_report.summarise(tmp_path)
    rows = results.by_run(results.read(tmp_path, "final"))
    for claim in found["main"]["claims"]:
        first, second = claim["contrast"].split(" - ")
        means = [
            np.mean(
                [
                    (
                        rows[RunId(s, w, first)]["test"]["all"][0]
                        - rows[RunId(s, w, second)]["test"]["all"][0]
                    )
                    / NUM
                    for s in plan_twelve.SEEDS
                ]
            )
            for w in plan_twelve.WORLDS
        ]
        assert claim["worlds"] == pytest.approx(means, abs=1e-6)
        exact = stats.ttest_1samp(means, 0)
        assert claim["p"] == pytest.approx(exact.pvalue, rel=1e-3)
        interval = exact.confidence_interval(0.95)
        assert (claim["low"], claim["high"]) == pytest.approx(tuple(interval), abs=2e-6)


def cut(folder, names, run):
    """Take a run out of files of rows."""
    for name in names:
        kept = [row for row in results.read(folder, name) if results.run_id(row) != run]
        (folder / f"{name}.jsonl").unlink()
        for row in kept:
            results.append(folder, name, row)


def test_without_all_answers_nothing_is_claimed_and_worlds_are_whole(tmp_path):
    made_rows(tmp_path, BETTER)
    cut(tmp_path, ["final"], runs(MAIN_ARMS)[-1])
    found = twelve_report.summarise(tmp_path)
    assert found["main"]["part"] == "val"
    assert found["main"]["worlds"] == list(plan_twelve.WORLDS)  # all have learned
    assert not any(claimed for _, claimed in outcomes(found))
    assert "probe" not in found["main"]
    page = "\n".join(twelve_page.results_part(found, []))
    assert "Nothing is tested yet" in page
    assert "outcome" not in page
    cut(tmp_path, ["runs"], runs(MAIN_ARMS)[-1])
    last = runs(MAIN_ARMS)[-1].world
    worlds = twelve_report.summarise(tmp_path)["main"]["worlds"]
    assert worlds == [world for world in plan_twelve.WORLDS if world != last]
    with pytest.raises(SystemExit, match=r"no world of .* has a row of every main arm"):
        twelve_report.summarise(tmp_path / "empty")


def test_claims_wait_for_main_arms_and_the_rest_for_all_of_its_worlds(tmp_path):
    made_rows(tmp_path, BETTER)
    part = next(run for run in runs(ARMS) if run.arm == "labels" and run.world == 4)
    cut(tmp_path, ["final", "runs"], part)
    found = twelve_report.summarise(tmp_path)
    assert found["main"]["part"] == "test"
    assert outcomes(found)[0] == ("better", True)
    assert found["rest"]["part"] == "val"
    assert found["rest"]["worlds"] == [w for w in plan_twelve.PART_WORLDS if w != 4]
    main = {arm.name for arm in MAIN_ARMS}
    for run in runs(ARMS):
        if run.arm == "labels" and run != part:
            cut(tmp_path, ["runs"], run)
    found = twelve_report.summarise(tmp_path)
    assert found["rest"] is None
    assert {arm["arm"] for arm in found["main"]["arms"]} == main
    text = "\n".join(twelve_page.results_part(found, []))
    assert "No world has all of these runs yet" in text
    assert "Not a result" not in text


def test_a_mixed_model_of_balanced_pairs_has_the_variances_that_anova_gives():
    draw = np.random.default_rng(1)
    values, pairs_WS = {}, np.zeros((12, 2))
    for at, world in enumerate(plan_twelve.WORLDS):
        effect = draw.normal(0.04, 0.02)
        for seed in plan_twelve.SEEDS:
            pairs_WS[at, seed] = effect + draw.normal(0, 0.01)
            values[RunId(seed, world, "none_mole")] = 0.5
            values[RunId(seed, world, "revised_mole")] = 0.5 + pairs_WS[at, seed]
    found = mixed_model(plan_twelve.PRIMARY, values)
    within = pairs_WS.var(axis=1, ddof=1).mean()
    between = pairs_WS.mean(1).var(ddof=1) - within / 2
    assert between > 0
    assert found["difference"] == pytest.approx(pairs_WS.mean(), abs=1e-6)
    assert found["std_between_pairs"] == pytest.approx(np.sqrt(within), rel=1e-2)
    assert found["std_between_worlds"] == pytest.approx(np.sqrt(between), rel=1e-2)
    error = pairs_WS.mean(1).std(ddof=1) / np.sqrt(12)
    assert found["high"] - found["difference"] == pytest.approx(1.96 * error, rel=1e-2)
    assert found["warnings"] == []


def test_worlds_that_do_not_differ_leave_a_warning_in_the_report():
    values = {}
    for world in plan_twelve.WORLDS:
        for seed in plan_twelve.SEEDS:
            values[RunId(seed, world, "none_mole")] = 0.5
            values[RunId(seed, world, "revised_mole")] = 0.54 + 0.01 * (-1) ** seed
    found = mixed_model(plan_twelve.PRIMARY, values)
    assert found["difference"] == pytest.approx(0.54 - 0.5)
    # 0 is the edge of what a variance can be; the optimiser stops where the likelihood is flat
    assert found["std_between_worlds"] < 0.2 * found["std_between_pairs"]
    assert found["warnings"]


def test_the_page_has_every_arm_part_and_control(tmp_path):
    made_rows(tmp_path, BETTER)
    found = twelve_report.summarise(tmp_path)
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / twelve_page.PAGE
    page.write_text(f"by hand\n{BEGIN}\nearlier\n{END}\nafter\n")
    trial = {"arm": "official_2", "keys": ["recipe=official", "distill.kd_weight=2"]}
    for world in range(3):
        row = {**trial, "finetune": [], "world": world, "seed": 100, "val": {"all": [256, 512]}}
        results.append(tmp_path, "exploratory", row)
        rate = {"arm": "slow", "base": "revised_full", "keys": ["training.learning_rate=1e-4"]}
        results.append(tmp_path, "afterwards", row | rate | {"pretrain": []})
    text = twelve_page.write_page(found, tmp_path, docs).read_text()
    assert text.startswith("by hand\n")
    assert text.endswith("after\n")
    assert "earlier" not in text
    assert "Not a result" not in text
    assert all(f"| `{arm.name}` |" in text for arm in ARMS)
    assert "| `kd_weight=2` | 0.500, 0.500, 0.500 | 0.5000 |" in text
    assert "| `revised_full` | `training.learning_rate=1e-4` | 0.500, 0.500, 0.500 |" in text
    parts = text[text.index("### Parts, experts, controls and ideas") :]
    parts = parts[: parts.index("contrast | difference")]
    both = [line for line in parts.splitlines() if line.count(" to ") == 2]
    assert len(both) == 10  # one of the eleven arms of the official recipe has no opposite
    claims = text[text.index("### Claims") : text.index("### Main arms")]
    primary = next(line for line in claims.splitlines() if "revised_mole - none_mole |" in line)
    assert points(found["main"]["claims"][0]) in primary
    assert primary.endswith("| better | yes |")
    assert (docs / twelve_page.FIGURE).stat().st_size > 10_000
    again = twelve_page.write_page(found, tmp_path, docs).read_text()
    assert again == text
    assert "No world has all runs of the main arms yet" in "\n".join(
        twelve_page.results_part(None, [])
    )


def test_the_committed_page_is_that_of_the_committed_rows():
    found = summary.read(results.TWELVE_RESULTS)
    tried, later = (
        results.read(results.TWELVE_RESULTS, kind) for kind in ("exploratory", "afterwards")
    )
    text = (twelve_page.DOCS / twelve_page.PAGE).read_text(encoding="utf-8")
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert written == "\n".join(twelve_page.results_part(found, tried, later))
    if found is not None:
        assert json.loads(json.dumps(twelve_report.summarise(results.TWELVE_RESULTS))) == found
