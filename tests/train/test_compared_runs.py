"""Real runs of two arms and two seeds, compared: what `movekd report --compare` reads."""

import json

import pytest

from movekd.view.arms import read_compared
from movekd.view.comparison import compare_runs

HELD_OUT = ("data.val_size=6", "training.eval_steps=3")


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Arm -> seed -> folder; seed 0 of ``kd`` twice."""
    folder = tmp_path_factory.mktemp("sweep")
    for arm, keys in (("kd", ()), ("none", ("distill=null",))):
        for seed in (0, 1):
            keys_of_seed = (*HELD_OUT, *keys, f"training.seed={seed}")
            digits.train(folder / f"{arm}{seed}", "pretrain", *keys_of_seed)
    digits.train(
        folder / "again", "pretrain", *HELD_OUT, "training.seed=0", "training.save_steps=4"
    )
    return folder


def test_seeds_of_real_runs_are_paired(runs):
    found = [read_compared(str(runs / name)) for name in ("kd0", "none1", "none0", "kd1")]
    comparison = compare_runs(found, "distill=null")
    assert comparison.keys == ["distill"]
    assert {arm.name: [run.seed for run in arm.runs] for arm in comparison.arms} == {
        "distill=given": ["0", "1"],
        "distill=null": ["0", "1"],
    }
    rows = {(r.measure.name, r.measure.at): r for r in comparison.rows if "given" in r.arm}

    def last(name, key):
        log = json.loads((runs / name / "log.json").read_text())
        return [entry[key] for entry in log if key in entry][-1]

    text = rows["eval_loss_text", "final"]
    pairs = [last(f"kd{s}", "eval_loss_text") - last(f"none{s}", "eval_loss_text") for s in (0, 1)]
    assert text.contrast.kind == "paired"
    assert text.contrast.interval.mean == pytest.approx(sum(pairs) / 2)
    spread = abs(pairs[0] - pairs[1]) / 2  # t with one degree of freedom is 12.706
    assert text.contrast.interval.high == pytest.approx(sum(pairs) / 2 + 12.7062 * spread, rel=1e-4)
    assert rows["eval_loss", "final"].contrast.kind == "not compared"
    assert rows["eval_loss_kd_clip", "best"].figure.interval.num == 2
    assert rows["loss_text", "final"].contrast.kind == "paired"
    assert all(figure.interval.mean > 0 for figure in comparison.costs["distill=given"].values())
    seen = {run.num_samples for arm in comparison.arms for run in arm.runs}
    assert len(seen) == 1


def test_a_repeated_run_differs_in_nothing(runs):
    """On CPU a run repeats bit for bit, so a difference would be the comparison's."""
    given = [f"first={runs / 'kd0'}", f"again={runs / 'again'}"]
    comparison = compare_runs([read_compared(one) for one in given])
    assert comparison.keys == []
    found = [row.contrast for row in comparison.rows if row.arm == "again"]
    assert len(found) > 10
    assert {contrast.kind for contrast in found} == {"paired"}
    assert {contrast.interval.mean for contrast in found} == {0.0}
