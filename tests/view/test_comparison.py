"""Means, pairs and intervals of arms equal SciPy's; what cannot be compared is refused."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from movekd.errors import ConfigError
from movekd.train.run_record import lock_run
from movekd.view.arms import read_compared
from movekd.view.comparison import compare_runs
from sweep import entries, pack_one, write_compared, write_log

RANDOM = np.random.default_rng(0)
TEXT = ("eval_loss_text", "final")


class Sweep:
    """Writes runs below a folder, and compares all of them."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus, self.given = folder, corpus, []

    def add(self, arm, seed, loss, *overrides, corpus=None, name=None, log=None, **kwargs):
        """Write a finished run whose last held-out text loss is ``loss``; add it to the arm."""
        folder = self.folder / (name or f"{arm}-{seed}")
        log = entries([2.0, 1.0], held_out=[loss]) if log is None else log
        corpus = self.corpus if corpus is None else corpus
        overrides = ("data.val_size=4", "training.eval_steps=2", *overrides)
        write_compared(folder, corpus, seed, *overrides, log=log, **kwargs)
        self.given.append(f"{arm}={folder}")
        return folder

    def arm(self, arm, losses, *overrides, first_seed=0, **kwargs):
        for seed, loss in enumerate(losses, first_seed):
            self.add(arm, seed, float(loss), *overrides, **kwargs)

    def compare(self, baseline=None, given=None):
        return compare_runs([read_compared(g) for g in given or self.given], baseline)

    def row(self, arm, measure=TEXT, **kwargs):
        return row_of(self.compare(**kwargs), arm, measure)


def row_of(comparison, arm, measure=TEXT):
    found = [r for r in comparison.rows if (r.measure.name, r.measure.at, r.arm) == (*measure, arm)]
    (row,) = found
    return row


def ends(interval):
    return pytest.approx((interval.low, interval.high))


@pytest.fixture
def sweep(tmp_path, corpus_dir):
    return Sweep(tmp_path / "runs", corpus_dir)


@pytest.fixture
def other(tmp_path, crops):
    """Another corpus."""
    return pack_one(crops[0], tmp_path / "other")


def test_seeds_are_paired_as_scipy_pairs_them(sweep):
    a, b = RANDOM.normal(1, 0.1, (2, 4))
    sweep.arm("a", a)
    sweep.arm("b", b, "student.mole.r=8")
    row = sweep.row("b")
    assert (row.contrast.kind, row.contrast.unit, row.contrast.nums) == ("paired", "seed", (4, 4))
    assert row.contrast.interval.mean == pytest.approx((b - a).mean())
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (expected.low, expected.high) == ends(row.contrast.interval)
    level = stats.ttest_1samp(b, 0).confidence_interval(0.95)
    assert (level.low, level.high) == ends(row.figure.interval)
    assert (row.figure.unit, row.figure.num_runs) == ("seed", 4)


def test_only_common_seeds_are_paired_and_the_others_are_named(sweep):
    a, b = RANDOM.normal(1, 0.1, (2, 4))
    sweep.arm("a", a[:3])
    sweep.arm("b", b[1:], "student.mole.r=8", first_seed=1)
    found = sweep.row("b").contrast
    expected = stats.ttest_rel(b[1:3], a[1:3]).confidence_interval(0.95)
    assert (expected.low, expected.high) == ends(found.interval)
    assert (found.kind, found.nums) == ("paired", (2, 2))
    assert found.reason == "without partner: seed 0, 3"


@pytest.mark.parametrize("first_seed", [2, 3])
def test_without_two_pairs_it_is_welch_as_scipy_has_it(sweep, first_seed):
    a, b = RANDOM.normal(1, 0.1, 3), RANDOM.normal(1.2, 0.02, 4)
    sweep.arm("a", a)
    sweep.arm("b", b, "student.mole.r=8", first_seed=first_seed)
    found = sweep.row("b").contrast
    expected = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert (expected.low, expected.high) == ends(found.interval)
    assert (found.kind, found.nums) == ("unpaired", (4, 3))
    assert found.reason == ("one pair only" if first_seed == 2 else "no seed in common")


@pytest.mark.parametrize("num", [1, 3])
def test_a_run_compared_with_itself_has_no_difference(sweep, num):
    sweep.arm("a", RANDOM.normal(1, 0.1, num))
    again = [given.replace("a=", "b=", 1) for given in sweep.given]
    comparison = sweep.compare(given=[*sweep.given, *again])
    compared = [row for row in comparison.rows if row.arm == "b"]
    assert len(compared) > 4
    for row in compared:
        assert row.contrast.kind == "paired"
        assert row.contrast.interval.mean == 0
        assert row.contrast.interval.is_bounded == (num > 1)
        if num > 1:
            assert (row.contrast.interval.low, row.contrast.interval.high) == (0, 0)


def test_the_order_of_runs_changes_no_figure(sweep):
    sweep.arm("a", RANDOM.normal(1, 0.1, 2))
    sweep.arm("b", RANDOM.normal(1, 0.1, 2), "student.mole.r=8")
    sweep.add("b", 0, 1.5, "student.mole.r=8", name="again")
    found, runs = [], [read_compared(given) for given in sweep.given]
    for order in itertools.permutations(runs):
        comparison = compare_runs(order, "a")
        rows = {(row.measure, row.arm): (row.figure, row.contrast) for row in comparison.rows}
        found.append((rows, comparison.costs, comparison.keys, set(comparison.notes)))
    assert len(found) == 120
    assert all(one == found[0] for one in found)


def test_an_arm_of_one_seed_has_no_interval_and_says_so(sweep):
    sweep.arm("a", [1.0, 1.1])
    sweep.arm("b", [0.9], "student.mole.r=8")
    comparison = sweep.compare()
    row = row_of(comparison, "b")
    assert not row.figure.interval.is_bounded
    assert (row.contrast.kind, row.contrast.nums) == ("paired", (1, 1))
    assert row.contrast.interval.mean == pytest.approx(-0.1)
    assert not row.contrast.interval.is_bounded
    assert "One seed, so no interval over seeds: b." in comparison.notes


def test_another_number_of_samples_is_not_paired(sweep):
    sweep.arm("a", [1.0, 1.1, 1.2])
    for seed, loss in enumerate([0.9, 1.1, 1.0]):
        log = entries([2.0, 1.0, 1.0, 1.0], held_out=[0.0, loss])
        sweep.add("b", seed, loss, "training.num_train_epochs=4", log=log)
    found = sweep.row("b").contrast
    assert (found.kind, found.reason) == ("unpaired", "not the same: the number of samples seen")
    assert not sweep.row("b", ("eval_loss_text", "best")).contrast.interval
    said = sweep.row("b", ("eval_loss_text", "best")).contrast.reason
    assert said == "measured on other data: steps of the evaluations"


def held_out_file(folder):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    (folder / "val.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
    return f"data.eval_conversations=[{folder / 'val.json'}]"


def test_another_corpus_with_the_same_held_out_file_is_not_paired(sweep, other, tmp_path):
    held_out = (held_out_file(tmp_path), "data.val_size=null")
    sweep.arm("a", [1.0, 1.1, 1.2], *held_out)
    sweep.arm("b", [0.9, 1.1, 1.0], *held_out, corpus=other)
    found = sweep.row("b").contrast
    assert (found.kind, found.unit) == ("unpaired", "seed")
    assert found.reason == "not the same: data.shards, data.conversations"
    training = sweep.row("b", ("loss_text", "final")).contrast
    assert training.interval is None
    assert training.reason == "measured on other data: data.shards, data.conversations"


@pytest.mark.parametrize("change", ["data.val_size=5", "corpus"])
def test_other_held_out_samples_are_not_compared(sweep, other, change):
    sweep.arm("a", [1.0, 1.1, 1.2])
    keys = {"corpus": other} if change == "corpus" else {}
    sweep.arm("b", [0.9, 1.1, 1.0], *([] if keys else [change]), **keys)
    found = sweep.row("b").contrast
    assert (found.kind, found.interval) == ("not compared", None)
    assert found.reason.startswith("measured on other data: data.")
    assert sweep.row("b").figure.interval.mean == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "name", "compared"),
    [
        ("student.mole.balance_weight=1", "eval_loss", "paired"),  # no part of it
        ("student.mole.balance_weight=1", "loss", "not compared"),
        ("student.mole.balance_weight=1", "loss_text", "paired"),
        ("student.prompt=plain", "eval_loss_text", "not compared"),
        ("data.model_max_length=99", "eval_loss_text", "not compared"),
        ("training.learning_rate=0.5", "eval_loss", "paired"),
    ],
)
def test_losses_that_mean_other_things_are_not_compared(sweep, change, name, compared):
    sweep.arm("a", [1.0, 1.1])
    sweep.arm("b", [0.9, 1.1], change)
    found = sweep.row("b", (name, "final")).contrast
    assert found.kind == compared
    if compared == "not compared":
        assert found.reason == f"other meaning: {change.partition('=')[0]}"


def test_several_data_sets_are_the_units(sweep, other):
    a, b = RANDOM.normal(1, 0.1, (2, 2, 3))
    for at, corpus in enumerate((sweep.corpus, other)):
        for seed in range(3):
            for arm, values, keys in (("a", a, ()), ("b", b, ("student.mole.r=8",))):
                name = f"{arm}-{at}-{seed}"
                sweep.add(arm, seed, values[at, seed], *keys, corpus=corpus, name=name)
    comparison = sweep.compare()
    row = row_of(comparison, "b")
    assert (row.figure.unit, row.figure.num_runs, row.figure.interval.num) == ("data set", 6, 2)
    level = stats.ttest_1samp(b.mean(1), 0).confidence_interval(0.95)
    assert (level.low, level.high) == ends(row.figure.interval)
    expected = stats.ttest_1samp((b - a).mean(1), 0).confidence_interval(0.95)
    assert (expected.low, expected.high) == ends(row.contrast.interval)
    assert (row.contrast.kind, row.contrast.unit) == ("paired", "data set")
    assert any("arm b" in n.lower() and "data.shards" in n for n in comparison.notes)


def test_runs_of_the_same_seed_count_as_one(sweep):
    sweep.arm("a", [1.0, 1.2])
    sweep.add("a", 0, 2.0, name="again")
    comparison = sweep.compare()
    figure = row_of(comparison, "a").figure
    assert (figure.interval.mean, figure.interval.num, figure.num_runs) == (
        pytest.approx(1.35),
        2,
        3,
    )
    assert "Arm a: 2 runs of seed 0 count as one, by their mean." in comparison.notes


def test_unfinished_runs_are_in_no_figure_and_counted(sweep):
    sweep.arm("a", [1.0, 1.2])
    log = entries([2.0, 1.0], held_out=[9.0])[:-1]
    stopped = sweep.add("a", 2, 9.0, log=log)
    begun = sweep.add("a", 3, 9.0, log=[])
    with lock_run(begun):
        comparison = sweep.compare()
    assert row_of(comparison, "a").figure.interval.mean == pytest.approx(1.1)
    ending = "in the curves up to the last checkpoint, in no figure"
    assert f"1 of 4 runs still training: {ending}: {begun}." in comparison.notes
    assert f"1 of 4 runs interrupted: {ending}: {stopped}." in comparison.notes
    assert f"1 of 4 runs logged no step: {begun}." in comparison.notes


def test_figures_that_are_not_finite_are_left_out_and_said(sweep):
    sweep.arm("a", [1.0, 1.2, math.nan])
    comparison = sweep.compare()
    assert row_of(comparison, "a").figure.interval.num == 2
    assert any(
        n.startswith("eval_loss_text, final: NaN or infinite") and n.endswith("a-2.")
        for n in comparison.notes
    )


def test_skipped_images_and_odd_values_are_said(sweep):
    run = sweep.add("a", 0, 1.0)
    row = {
        "teacher": "clip", "rows": 10, "grid": 6, "width": 64, "codec": "int8",
        "compressor": "none", "size_bytes": 1, "error_mean": None, "error_max": None,
        "skipped": 3, "fingerprint": "ab", "random_weights": True,
    }  # fmt: skip
    (run / "targets.json").write_text(json.dumps([row]))
    write_log(run, [*entries([1.0]), {"step": 1, "loss": "abc"}])
    notes = " ".join(sweep.compare().notes)
    assert f"Teacher clip skipped 3 images of its cache, in 1 of 1 runs: {run}." in notes
    assert "Teachers with random weights: clip." in notes
    assert f"{run}: left out, because it cannot be read as what it should be: log.json: " in notes


def test_runs_without_checksums_are_compared_only_with_themselves(sweep):
    sweep.arm("a", [1.0, 1.1])
    sweep.arm("b", [1.0, 1.1], "student.mole.r=8")
    for given in sweep.given:
        sweep.folder.joinpath(given[2:], "inputs.json").unlink()
    found = sweep.row("b").contrast
    assert found.kind == "not compared"
    assert "recorded no checksums" in found.reason
    given = [*sweep.given[:2], *(g.replace("a=", "c=", 1) for g in sweep.given[:2])]
    assert sweep.row("c", given=given).contrast.kind == "paired"


def test_final_and_best_figures(sweep):
    losses = [5.0] * 18 + [1.0, 3.0]
    log = entries(losses, held_out=[1.0, 0.5, 0.75], eval_knn_cls_accuracy=0.5)
    log.insert(-1, {"step": 8, "eval_knn_cls_accuracy": 0.25})
    sweep.add("a", 0, 0.0, log=log)
    expected = {
        ("eval_loss_text", "final"): (0.75, "lower"),
        ("eval_loss_text", "best"): (0.5, "lower"),
        ("eval_knn_cls_accuracy", "final"): (0.25, "higher"),
        ("eval_knn_cls_accuracy", "best"): (0.5, "higher"),
        ("loss_text", "final"): (2.0, "lower"),  # of the last two steps of 20
    }
    comparison = sweep.compare()
    for measure, (mean, goal) in expected.items():
        row = row_of(comparison, "a", measure)
        assert (row.figure.interval.mean, row.measure.goal) == (mean, goal)
    assert not any("runtime" in row.measure.name for row in comparison.rows)
    costs = {name: figure.interval.mean for name, figure in comparison.costs["a"].items()}
    seconds = {"seconds_per_step": 0.5, "samples_per_second": 8.0}
    assert costs == seconds | {"memory_peak_gib": 1.5 + 19 / 8}
    assert comparison.arms[0].runs[0].num_samples == 80


def test_packed_rows_have_no_seconds_per_step(sweep):
    sweep.add("a", 0, 1.0, "data.packing=true", "data.group_by_modality_length=false")
    assert sweep.compare().costs["a"]["seconds_per_step"] is None


def test_a_baseline_is_chosen_by_name(sweep):
    sweep.arm("first", [1.0, 1.1])
    sweep.arm("second", [0.9, 1.1], "student.mole.r=8")
    one, other = (
        sweep.row(arm, baseline=b).contrast for arm, b in (("second", None), ("first", "second"))
    )
    assert one.interval.mean == -other.interval.mean
    with pytest.raises(ConfigError, match=r"--baseline is 'secnd'; .*first; second.*'second'\?"):
        sweep.compare("secnd")
