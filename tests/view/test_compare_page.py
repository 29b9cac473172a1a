"""The page of a comparison: complete, safe to open, and no network."""

import copy
import json
import math

import pytest
import yaml

from html_page import Page
from movekd.errors import ConfigError
from movekd.view.arm_plots import arm_figures, x_axis
from movekd.view.arms import read_compared
from movekd.view.compare_page import comparison_json, write_comparison
from movekd.view.comparison import compare_runs
from sweep import entries, write_compared, write_log


@pytest.fixture
def runs(tmp_path, corpus_dir):
    """Two arms of two seeds, and a third run of the second arm that has not ended."""
    found = []
    for seed in range(3):
        held_out = [1.0 + seed / 8, 0.5 + seed / 8]
        log = entries([2.0, 1.5, 1.0, 0.5], held_out=held_out, eval_loss_kd_clip=0.25)
        for name, keys in (("a", ()), ("b", ("student.mole.r=8",))):
            if (name, seed) == ("a", 2):
                continue
            ended = log if seed < 2 else log[:-1]
            keys = ("data.val_size=4", "training.eval_steps=2", *keys)
            folder = tmp_path / f"{name}{seed}"
            found.append(write_compared(folder, corpus_dir, seed, *keys, log=ended))
    return found


def compare(runs, names=("{}",)):
    return compare_runs([read_compared(name.format(run)) for run in runs for name in names])


def test_a_page_holds_everything_and_loads_nothing(runs, tmp_path):
    comparison = compare(runs)
    write_comparison(comparison, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    page = Page(source)
    assert all(url.startswith("#") for url in page.loads)
    assert "script" not in page.tags
    assert "@import" not in source
    text = " ".join(page.text.split())
    assert "5 runs in 2 arms" in text
    for said in (*(arm.name for arm in comparison.arms), *map(str, runs), *comparison.notes):
        assert said in text
    for key in ("student.mole.r", "student.mole.lora_alpha"):
        assert key in text
    assert "eval_loss_text, final (lower is better)" in text
    assert "paired by seed, 2 pairs" in text
    assert "Over: optimizer step." in text
    assert "minus lora_alpha=64, r=16" in text


def test_the_same_runs_give_the_same_page(runs, tmp_path):
    for name in ("one.html", "two.html"):
        write_comparison(compare(runs), tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_json_has_the_figures_of_the_page(runs):
    comparison = compare(runs)
    found = json.loads(json.dumps(comparison_json(comparison), allow_nan=False))
    assert found["baseline"] == "lora_alpha=64, r=16"
    assert [len(arm["runs"]) for arm in found["arms"]] == [2, 3]
    assert found["arms"][1]["keys"]["student.mole.r"] == "8"
    assert found["arms"][1]["runs"][2]["state"] == "interrupted"
    assert found["arms"][0]["runs"][0]["samples"] == 16
    (row,) = [
        f for f in found["figures"]
        if (f["measure"], f["at"], f["arm"]) == ("eval_loss_text", "final", "lora_alpha=32, r=8")
    ]  # fmt: skip
    assert row["figure"]["mean"] == 0.5625
    assert row["figure"]["low"] < 0.5625 < row["figure"]["high"]
    assert (row["difference"]["kind"], row["difference"]["mean"]) == ("paired", 0)
    assert (row["difference"]["low"], row["difference"]["num_units"]) == (0, 2)


def test_single_seeds_have_null_for_an_interval(runs):
    found = comparison_json(compare(runs[:2]))
    figure = found["figures"][-1]
    assert figure["figure"]["low"] is figure["difference"]["high"] is None
    assert found["num_differences"] == 0


def test_a_page_of_runs_that_have_not_ended_has_curves_and_no_figures(runs, tmp_path):
    comparison = compare(runs[-1:])
    assert comparison.rows == []
    write_comparison(comparison, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "None: no run has ended." in page.text
    assert "1 of 1 runs interrupted" in page.text
    assert "eval_loss_text" in page.text


def test_names_are_text(runs, tmp_path):
    bad = "<script>alert(1)</script>"
    folder = runs[0].rename(tmp_path / "<b>bold")
    comparison = compare([folder], (f"{bad}={{}}",))
    write_comparison(comparison, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "script" not in page.tags
    assert page.text.count(bad) >= 4
    assert "<b>bold" in page.text


def test_a_curve_is_the_mean_of_ended_runs_beside_each_run(runs):
    comparison = compare(runs)
    figures = {
        measure.name: figure
        for measure, figure in arm_figures(comparison.arms, comparison.measures, "optimizer step")
    }
    lines = figures["eval_loss_text"].axes[0].lines
    assert [line.get_linewidth() > 1 for line in lines] == [False] * 2 + [True] + [False] * 3 + [
        True
    ]
    bold = [line for line in lines if line.get_linewidth() > 1]
    assert [list(line.get_ydata()) for line in bold] == [[1.0625, 0.5625]] * 2
    assert [line.get_color() for line in bold] == ["C0", "C1"]
    assert [line.get_linestyle() for line in lines].count("--") == 1  # has not ended
    assert "eval_loss_kd_clip" in figures


def test_curves_are_over_samples_where_steps_have_other_sizes(runs, tmp_path, corpus_dir):
    large = write_compared(tmp_path / "large", corpus_dir, 0, log=entries([2.0, 1.0]), per_step=8)
    comparison = compare([runs[0], large])
    found = [run for arm in comparison.arms for run in arm.runs]
    assert x_axis(found) == "samples seen"
    assert x_axis([read_compared(str(run)) for run in runs]) == "optimizer step"
    _, figure = next(
        (m, f) for m, f in arm_figures(comparison.arms, comparison.measures, "samples seen")
        if m.name == "loss_text"
    )  # fmt: skip
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[4, 8, 12, 16], [8, 16]]
    (large / "inputs.json").unlink()
    assert x_axis([found[0], read_compared(str(large))]) == "optimizer step"


ODD = [
    *(None, True, "abc", "", -1, 0, 10**40, 1e308, math.nan, math.inf, [], {}, [[1]], {"a": 1}),
    *("<script>alert(1)</script>", "$\\frac{", "\x1b[2J\0", "\ud800", {1: 2, "b": {None: 3}}),
]
"""What a stranger may write in place of a number or a word."""
PLACES = [
    *(("config.yaml", key) for key in ("training.seed", "training.data_seed", "training")),
    *(("config.yaml", key) for key in ("init_from", "stage", "student.mole", "data.val_size")),
    *(("inputs.json", key) for key in ("corpus", "global_batch_size", "split", "features of x")),
    *(("log.json", key) for key in ("0.step", "0.loss_text", "4.eval_loss_text", "6.step", "4")),
]


@pytest.mark.parametrize(
    "number",
    [pytest.param(at, marks=[pytest.mark.slow] * (at % 3 > 0)) for at in range(len(ODD))],
)
def test_odd_values_end_in_figures_or_a_sentence(runs, tmp_path, number):
    """A stranger's run beside ours, with an odd value in each place in turn."""
    odd, files = ODD[number], {}
    for name in ("config.yaml", "inputs.json", "log.json"):
        files[name] = yaml.safe_load((runs[1] / name).read_text())
    for name, key in PLACES:
        content = copy.deepcopy(files[name])
        *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        inner = content
        for part in parents:
            inner = inner[part]
        inner[last] = odd
        written = json.dumps(content) if name.endswith("json") else yaml.safe_dump(content)
        (runs[1] / name).write_text(written, "utf-8", "surrogatepass")
        try:
            comparison = compare(runs[:2])
        except ConfigError as error:
            said = str(error)
            assert said.isprintable()
            assert len(said) < 2000
        else:
            text = json.dumps(comparison_json(comparison), allow_nan=False)
            assert len(text) < 100_000
            assert all(len(note) < 3000 for note in comparison.notes)
            if PLACES.index((name, key)) == number % len(PLACES):  # pages take time
                write_comparison(comparison, tmp_path / "page.html")
                page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
                assert "script" not in page.tags
        (runs[1] / name).write_text(json.dumps(files[name]))


def test_a_log_of_many_names_is_cut_and_says_so(runs, tmp_path):
    log = entries([1.0])
    log[0] |= {f"loss_{number}": 1.0 for number in range(300)}
    write_log(runs[0], log)
    comparison = compare(runs[:1])
    assert len(comparison.measures) == 200
    assert "302 figures were logged; the first 200 are shown." in comparison.notes
