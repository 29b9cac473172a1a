"""The comparison of codecs: claims end at the first codec that is not equal within a point."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from study import codec_report, results
from study.plan import CODEC_ARMS, CODECS, runs
from study.summary import REPORT as REPORT_FILE

MARGIN = 0.01
REPORT = json.loads((results.CODEC_RESULTS / REPORT_FILE).read_text(encoding="utf-8"))
LOSSES = {"int8": 0.0, "int4": 0.001, "lloyd4": -0.002, "lloyd3": 0.004, "lloyd2": 0.03}
"""What each codec costs in the made rows; the others nothing."""


def made_rows(folder: Path) -> None:
    """Write rows whose accuracies differ by ``LOSSES`` and a little noise."""
    draw = np.random.default_rng(0)
    for run in runs(CODEC_ARMS):
        codec = run.arm.removeprefix("codec_")
        share = 0.5 + 0.02 * run.world - LOSSES.get(codec, 0.0) + draw.normal(0, 0.002)
        size = {"float16": 800, **{c: 400 - 40 * i for i, c in enumerate(CODECS)}}[codec]
        cache = {"clip": {"row_bytes": size + 100, "token_bytes": size, "error_energy": 0.01}}
        name: dict[str, Any] = {"arm": run.arm, "world": run.world, "seed": run.seed}
        val = {"val": {"all": [round(512 * share), 512]}}
        results.append(folder, "runs", {**name, "cache": cache, **val})
        right = round(2048 * share)
        results.append(folder, "final", {**name, "test": {"all": [right, 2048]}})


def test_claims_end_at_the_first_codec_that_fails(tmp_path):
    made_rows(tmp_path)
    found = codec_report.summarise(tmp_path)
    claimed = {c["contrast"].split()[0]: c["claimed"] for c in found["contrasts"]}
    assert [name for name, yes in claimed.items() if yes] == [
        f"codec_{codec}" for codec in CODECS[:4]
    ]
    assert found["contrasts"][5]["holds"]  # equal, and still not claimed
    assert [codec["row_bytes"] for codec in found["codecs"][:2]] == [900, 500]
    assert {codec["runs"] for codec in found["codecs"]} == {24}


def test_without_all_answers_validation_scenes_of_whole_seeds_claim_nothing(tmp_path):
    made_rows(tmp_path)
    cut(tmp_path / "final.jsonl")
    cut(tmp_path / "runs.jsonl")
    found = codec_report.summarise(tmp_path)
    assert (found["part"], found["seeds"]) == ("val", list(range(7)))
    assert found["num_questions"] == 512
    assert {codec["runs"] for codec in found["codecs"]} == {21}
    assert not any(contrast["claimed"] for contrast in found["contrasts"])
    with pytest.raises(SystemExit, match=r"no seed of .* has a row of every codec yet"):
        codec_report.summarise(tmp_path / "nothing")


def cut(path: Path) -> None:
    """Remove the last line."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def test_the_committed_report_is_that_of_the_committed_rows():
    again = codec_report.summarise(results.CODEC_RESULTS)
    assert json.loads(json.dumps(again)) == REPORT


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")  # worlds that happen to agree
def test_the_committed_tests_are_two_one_sided_t_tests_of_the_worlds_means():
    part = REPORT["part"]
    file = "final" if part == "test" else "runs"
    lines = (results.CODEC_RESULTS / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    share = {
        (row["arm"], row["world"], row["seed"]): row[part]["all"][0] / row[part]["all"][1]
        for row in map(json.loads, lines)
    }
    holds = []
    for contrast, codec in zip(REPORT["contrasts"], CODECS, strict=True):
        pairs = [
            [share[f"codec_{codec}", w, s] - share["codec_float16", w, s] for s in REPORT["seeds"]]
            for w in range(3)
        ]
        means = np.mean(pairs, axis=1)
        assert contrast["worlds"] == pytest.approx(means, abs=1e-6)
        above = stats.ttest_1samp(means, -MARGIN, alternative="greater").pvalue
        below = stats.ttest_1samp(means, MARGIN, alternative="less").pvalue
        assert contrast["p"] == pytest.approx(max(above, below), rel=2e-3, abs=1e-9)
        holds.append(part == "test" and max(above, below) < 0.05)
    claimed = [contrast["claimed"] for contrast in REPORT["contrasts"]]
    assert claimed == list(accumulate(holds, lambda before, now: before and now))


def test_the_page_says_in_words_what_the_report_says():
    page = (results.RESULTS.parents[2] / "docs/codecs.md").read_text(encoding="utf-8")
    words = " ".join(page[page.index("<!-- study: end -->") : page.index("## Photographs")].split())
    energy = {codec["codec"]: codec["energy_error"]["mean"] for codec in REPORT["codecs"]}
    found = {c["contrast"].split()[0].removeprefix("codec_"): c for c in REPORT["contrasts"]}
    for codec in ("lloyd3", "lowrank8", "lloyd2", "lowrank4"):
        loss = f"{-100 * found[codec]['difference']:.2f}".removeprefix("0")
        assert f"{loss} at {energy[codec]:.1%}" in words, codec
    for codec in ("int8", "int4", "lloyd4", "lowrank16"):
        assert round(abs(100 * found[codec]["difference"]), 2) <= 0.04
        assert energy[codec] <= 0.0251
    unclaimed = [codec for codec, contrast in found.items() if not contrast["claimed"]]
    assert unclaimed == ["lowrank4"]
    ends = [f"{-100 * found['lloyd2'][end]:.2f}".removeprefix("0") for end in ("high", "low")]
    assert f"({' to '.join(ends)} over worlds" in words
    for codec, contrast in found.items():  # all other intervals contain zero
        if codec not in ("lloyd2", "lowrank4"):
            for interval in (contrast, contrast["pooled_pairs"]):
                assert interval["low"] < 0 < interval["high"], codec
