"""Tests of `cache plan`, `cache fidelity` and `cache verify --recompute`."""

import json

import pytest
import typer
import yaml

from command import invoke
from movekd.cli.cache_fidelity import fidelity
from movekd.cli.cache_plan import plan
from movekd.cli.cache_verify import recompute_problems
from movekd.errors import ConfigError

app = typer.Typer()
app.command()(plan)
app.command()(fidelity)


def run(*words):
    return invoke(app, *words)


@pytest.fixture(autouse=True)
def _measure_briefly(monkeypatch) -> None:
    monkeypatch.setattr("movekd.analysis.plan._MIN_SECONDS", 0.0)
    monkeypatch.setattr("movekd.analysis.disk_benchmark._SECONDS", 0.0)


@pytest.fixture
def asked(tmp_path, tiny_specs, corpus_dir) -> list[str]:
    """`--teacher` for each of the tiny specs, and `--shards`."""
    arguments = ["--shards", str(corpus_dir)]
    for spec in tiny_specs:
        path = tmp_path / f"{spec.name}.yaml"
        path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        arguments += ["--teacher", str(path)]
    return arguments


def test_plan_says_the_same_in_json_and_as_a_table(tmp_path, asked) -> None:
    command = ("plan", *asked, "--cache", tmp_path / "cache", "--num-images", 1000)
    planned = json.loads(run(*command, "--json", "--train-rate", 50, "--epochs", 2).stdout)
    assert planned["runs"] == {"images_per_s": 50.0, "epochs": 2.0}
    assert planned["disk"]["write_bytes_per_s"] > 0
    chosen = [part for part in planned["teachers"] if part["is_spec"]]
    assert planned["total_bytes"] == sum(1000 * part["row_bytes"] for part in chosen)
    shown = run(*command).stdout
    assert "1,000 images" in shown
    assert "training of (assumed) 100 images/s" in shown
    assert "all *" in shown
    assert max(len(line) for line in shown.splitlines()[1:]) <= 120  # the table
    assert not (tmp_path / "cache").exists()


def test_plan_with_assumed_rates_and_no_disk(asked) -> None:
    command = ("plan", *asked, "--cache", "memory://plan/x", "--no-measure-disk")
    planned = json.loads(
        run(*command, "--assume-rate", 5, "--assume-rate", "conv=7", "--json").stdout
    )
    assert {p["teacher"]: p["images_per_s"] for p in planned["teachers"]} == {"clip": 5, "conv": 7}
    assert planned["disk"]["write_bytes_per_s"] is None
    shown = run(*command, "--assume-rate", "clip=5").stdout
    assert "- free at memory://plan/x; disk not measured" in shown
    assert "images/s assumed, not measured: clip\n" in shown
    with pytest.raises(ConfigError, match="'fast' for 'clip'; expected images/s"):
        run(*command, "--assume-rate", "fast")
    with pytest.raises(ConfigError, match=r"names 'clop', .* Did you mean 'clip'\?"):
        run(*command, "--assume-rate", "clop=3")


def test_plan_exits_with_one_when_there_is_no_room(tmp_path, asked) -> None:
    result = run("plan", *asked, "--cache", tmp_path, "--num-images", 10**15)
    assert result.exit_code == 1
    assert "more than is free" in result.stderr


def test_plan_of_full_size_teachers_fits_the_terminal(tmp_path, corpus_dir) -> None:
    teachers = [part for name in ("eva02_clip", "convnext", "sam") for part in ("--teacher", name)]
    command = ("plan", *teachers, "--shards", corpus_dir, "--num-images", 10**7)
    shown = run(*command, "--cache", "memory://plan/y", "--assume-rate", 1, "--no-measure-disk")
    lines = shown.stdout.splitlines()
    assert max(len(line) for line in lines) <= 120
    assert len([line for line in lines if "eva02_clip" in line and "int8" in line]) == 1


def test_fidelity_says_the_same_in_json_and_as_a_table(asked) -> None:
    command = ("fidelity", *asked, "--num-images", 4, "--student-grid", 3, "--student-width", 16)
    command += ("--num-workers", 0, "--calibration-images", 6)
    reports = json.loads(run(*command, "--json").stdout)
    assert [report["teacher"] for report in reports] == ["clip", "conv"]
    assert reports[0]["calibration_images"] == 6
    way = next(way for way in reports[0]["ways"] if way["is_spec"])
    shown = run(*command).stdout
    assert "RANDOM WEIGHTS" in shown
    assert f"{way['error_mean']:.3%}" in shown
    near = way["revised_near"]
    assert f"{near['mean']:.5f} ({near['worst']:.5f})" in shown
    assert max(len(line) for line in shown.splitlines()[1:]) <= 120  # the table


def test_recompute_needs_images_and_knows_its_teachers(cache_dir, corpus_dir) -> None:
    def ask(teachers=(), weights=()):
        asked = (str(cache_dir), 3, corpus_dir, teachers, weights, 0, "cpu", 4)
        return list(recompute_problems(*asked, lambda what, done, total: None))

    assert ask() == []
    assert ask(teachers=["conv"]) == []
    with pytest.raises(ConfigError, match=r"--weights fits one teacher.* NAME=PATH"):
        ask(weights=["here"])
    with pytest.raises(ConfigError, match="names 'sam', which is not among the teachers: clip"):
        ask(weights=["sam=here"])
    with pytest.raises(ConfigError, match="no teacher 'sam'"):
        ask(teachers=["sam"])
