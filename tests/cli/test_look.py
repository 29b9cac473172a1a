"""`cache show`, `report`, `doctor` and `view`, as the command line gives them."""

import json
import os
import socket

import pytest
import typer
import yaml

from command import invoke
from movekd.cli.cache_show import show
from movekd.cli.doctor import doctor
from movekd.cli.report import report
from movekd.cli.view import view
from movekd.errors import ConfigError, CorpusError, UnknownKeyError
from small_run import write_run

app = typer.Typer()
for command in (show, report, doctor, view):
    app.command()(command)


def run(*words):
    return invoke(app, *words)


def test_show_writes_a_sheet_an_image(tmp_path, cache_dir, corpus_dir):
    command = ("show", "--cache", cache_dir, "--shards", corpus_dir, "--output", tmp_path / "out")
    drawn = json.loads(run(*command, "--random", 2, "--json").stdout)
    again = json.loads(run(*command, "--random", 2, "--json").stdout)
    assert drawn == again
    assert len({sheet["key"] for sheet in drawn}) == 2
    for sheet in drawn:
        assert (tmp_path / "out" / f"{sheet['key'][:16]}-0.png").stat().st_size > 10_000
    (one,) = json.loads(run(*command, "--key", "photos/04.png", "--exact", "--json").stdout)
    assert one["name"] == "photos/04.png"
    assert all(0 < teacher["error_mean"] < 0.05 for teacher in one["teachers"])


def test_show_in_the_terminal_writes_no_file(tmp_path, cache_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("show", "--cache", cache_dir, "--key", "photos/04.png", "--inline").stdout
    assert shown.count("▄") > 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --key NAME, or --random 8"),
        (("--random", 1, "--exact"), "give --shards with the corpus"),
        (("--random", 1, "--weights", "clip=x"), "--weights goes with --exact"),
    ],
)
def test_show_refuses_what_makes_no_sense(cache_dir, options, said):
    with pytest.raises(ConfigError, match=said):
        run("show", "--cache", cache_dir, *options)


def test_show_says_which_image_is_unknown(cache_dir):
    with pytest.raises(UnknownKeyError, match=r"nowhere\.png"):
        run("show", "--cache", cache_dir, "--key", "nowhere.png")


@pytest.fixture
def finished(tmp_path):
    """A run with a model that answers, and a log of one step."""
    folder = write_run(tmp_path / "finetune", "v1")
    config = yaml.safe_load((folder / "model" / "config.yaml").read_text())
    config |= {"stage": "finetune", "recipe": "revised", "distill": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ending = {"train_runtime": 1.0, "train_samples_per_second": 2.0}
    (folder / "log.json").write_text(json.dumps([{"loss": 1.0, "step": 1, "epoch": 1.0}, ending]))
    return folder


def test_report_asks_the_model_questions(finished, tmp_path, crops):
    (tmp_path / "images").mkdir()
    crops[0].save(tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "7"}]
    entry = {"id": "1", "image": "a.png", "conversations": turns}
    (tmp_path / "test.json").write_text(json.dumps([entry]))
    asked = ("--questions", tmp_path / "test.json", "--images", tmp_path / "images")
    said = json.loads(run("report", finished, *asked, "--json").stdout)
    assert said["answers"] == 1
    page = (finished / "report.html").read_text()
    assert "Which digit?" in page
    assert "data:image/jpeg;base64," in page
    assert run("report", finished, "--output", tmp_path / "r.html").stdout.strip() == str(
        tmp_path / "r.html"
    )


def test_report_says_what_it_left_out_and_exits_with_1(finished):
    log = [*json.loads((finished / "log.json").read_text()), {"loss": "abc", "step": 2}]
    (finished / "log.json").write_text(json.dumps(log))
    done = run("report", finished)
    assert done.exit_code == 1
    assert "left out: log.json: loss: abc." in done.stderr
    assert "log.json: loss: abc" in (finished / "report.html").read_text()
    assert json.loads(run("report", finished, "--json").stdout)["left_out"]


@pytest.mark.parametrize("name", ["a\0.png", "../a.png", "/etc/passwd", "pipe.png", "cut.png"])
def test_report_checks_its_images_before_a_model_loads(finished, tmp_path, name):
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "pipe.png")
    (tmp_path / "images" / "cut.png").write_bytes(b"\x89PNG")
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "7"}]
    (tmp_path / "q.json").write_text(json.dumps([{"image": name, "conversations": turns}]))
    (finished / "model" / "config.yaml").unlink()  # loading would fail
    asked = ("--questions", tmp_path / "q.json", "--images", tmp_path / "images")
    with pytest.raises(CorpusError, match="1 of 1 images cannot be used"):
        run("report", finished, *asked)


def test_report_wants_questions_and_images_together(finished):
    with pytest.raises(ConfigError, match="go together"):
        run("report", finished, "--questions", "x.json")


def test_doctor_prints_what_it_found(tmp_path):
    command = ("doctor", "--cache", tmp_path / "cache", "--no-disk")
    found = json.loads(run(*command, "--json").stdout)
    assert found["problems"] == []
    assert {teacher["teacher"] for teacher in found["teachers"]} >= {"clip", "eva02", "sam"}
    assert "openai/clip-vit-large-patch14-336" in run(*command).stdout


def test_view_says_that_its_port_is_taken(cache_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
            run("view", "--cache", cache_dir, "--port", port)
