"""Tests of movekd.evaluate.benchmarks.registry: a benchmark from outside, through the command."""

import json

import pytest

import scenes
from command import invoke
from movekd.cli.main import app
from movekd.errors import ConfigError
from movekd.evaluate.benchmarks import Benchmark, Question, Report, register_benchmark
from movekd.evaluate.benchmarks.registry import BENCHMARKS
from small_run import write_run


def load(path):
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return [Question(i, text, image) for i, (image, text) in enumerate(rows)]


def score(questions, answers, annotations):
    right = annotations.read_text().splitlines()
    pairs = [(a, len(b)) for a, b in zip(right, answers, strict=True)]
    rows = {"all": {"characters": sum(n for _, n in pairs), "questions": len(questions)}}
    return Report("characters", rows["all"]["characters"], rows)


def submit(path, questions, answers, _):
    path.write_text(json.dumps([[q.id, a] for q, a in zip(questions, answers, strict=True)]))


@pytest.fixture
def mine():
    register_benchmark(
        Benchmark("mine", load, score, "a text file with one answer per line", submit)
    )
    yield
    del BENCHMARKS["mine"]


def test_a_benchmark_from_outside_runs_through_the_command(mine, tmp_path, crops):
    scenes.write_corpus(tmp_path / "run", num_pretrain=1, num_finetune=1, num_val=1, num_test=1)
    run = write_run(tmp_path / "run")
    crops[0].save(tmp_path / "a.png")
    (tmp_path / "q.csv").write_text("a.png,Which digit?\na.png,How many?\n")
    (tmp_path / "right.txt").write_text("3\n1\n")
    words = ["evaluate", run, "--benchmark", "mine", "--questions", tmp_path / "q.csv"]
    words += ["--images", tmp_path, "--max-new-tokens", 4, "--device", "cpu"]

    def evaluate(*more):
        return invoke(app, *words, *more).stdout

    unscored = evaluate()
    assert "give --annotations: a text file with one answer per line" in unscored
    assert "no interval: nothing is scored here" in unscored
    given = ("--annotations", tmp_path / "right.txt", "--submission", tmp_path / "s.json")
    said = json.loads(evaluate(*given, "--json"))
    submitted = json.loads((tmp_path / "s.json").read_text())
    assert [number for number, _ in submitted] == [0, 1]
    total = sum(len(answer) for _, answer in submitted)
    assert said["figure"] == {"name": "characters", "value": total}
    assert said["asked"] == 0  # the first call asked both
    assert (said["intervals"], said["comparison"]) == (None, None)
    assert "no interval: the benchmark's scorer returns a Report without a sample" in evaluate(
        *given
    )
    answers = run / "answers" / "q.jsonl"
    with pytest.raises(ConfigError, match=r"scorer of mine returns a Report without a sample"):
        evaluate(*given, "--baseline", answers)


def test_a_name_is_registered_once(mine):
    with pytest.raises(ConfigError, match="'pope' exists already; give another name"):
        register_benchmark(BENCHMARKS["pope"])
