"""`movekd report --compare`, as the command line gives it."""

import json

import pytest
import typer

from command import invoke
from movekd.cli.report import report
from movekd.errors import ConfigError
from sweep import entries, write_compared, write_log

app = typer.Typer()
app.command()(report)


def run(*words):
    return invoke(app, *words)


@pytest.fixture
def runs(tmp_path, corpus_dir):
    """Two seeds of one config."""
    log = entries([2.0, 1.0])
    return [write_compared(tmp_path / f"s{s}", corpus_dir, s, log=log) for s in (0, 1)]


def test_compare_writes_a_page_and_says_what_to_know(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("--compare", *runs)
    assert done.stdout == "comparison.html\n"
    assert "2 runs in 1 arm" in (tmp_path / "comparison.html").read_text()
    done = run("--compare", f"a={runs[0]}", f"b={runs[1]}", "--output", tmp_path / "other.html")
    assert done.stderr == "movekd: One seed, so no interval over seeds: a; b.\n"
    assert (tmp_path / "other.html").exists()


def test_json_prints_the_figures(runs, tmp_path):
    path = tmp_path / "page.html"
    done = run("--compare", *runs, "--json", "--output", path)
    found = json.loads(done.stdout)
    assert found["report"] == str(path)
    assert path.exists()
    (figure,) = [f["figure"] for f in found["figures"] if f["measure"] == "loss_text"]
    assert (figure["mean"], figure["num_units"], figure["unit"]) == (1.0, 2, "seed")


def test_what_is_left_out_is_said_with_exit_code_1(runs, tmp_path):
    write_log(runs[0], [*entries([1.0]), {"step": 1, "loss": "abc"}])
    done = run("--compare", *runs, "--output", tmp_path / "page.html")
    assert done.exit_code == 1
    assert "left out: log.json: loss: abc." in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{0}", "{1}"), r"found 2 runs; expected one\. Give --compare"),
        (("{0}", "--baseline", "a"), "--baseline goes with --compare"),
        (("--compare", "{0}", "--baseline", "a"), "--baseline is 'a'; expected the name of an arm"),
        (("--compare", "{0}", "{0}"), "is given twice"),
        (("--compare", "{0}", "nowhere"), "nowhere holds no config.yaml"),
        (("--compare", "{0}", "--questions", "q", "--images", "i"), "--questions goes with one"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(runs, words, said):
    with pytest.raises(ConfigError, match=said):
        run(*(word.format(*runs) for word in words))
