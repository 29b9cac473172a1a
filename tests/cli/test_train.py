"""Tests of `movekd train`, `evaluate` and `ask`: the whole way through the real command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import scenes
from movekd.cli.main import app
from movekd.errors import ConfigError
from movekd.train.trainer import DistillTrainer

PIPELINE = Path(scenes.__file__).parent


def run(*arguments):
    """Run a command in this process; return what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def training(stage, folder, *overrides):
    """Return the words of `movekd train` for a stage of two steps."""
    fixed = [
        f"data.shards={folder / 'data'}",
        f"data.conversations=[{folder / stage}.json]",
        "distill.teachers=[clip, convnext]",
        "training.per_device_train_batch_size=4",
        "training.max_steps=2",
        "training.logging_steps=1",
        "training.use_cpu=true",
        *overrides,
    ]
    sets = [word for override in fixed for word in ("--set", override)]
    return ["train", "--config", PIPELINE / f"{stage}.yaml", "--output", folder / stage, *sets]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which everything was made by commands, from scenes to a finetuned student."""
    folder = tmp_path_factory.mktemp("whole")
    scenes.write_corpus(folder, num_pretrain=8, num_finetune=8, num_val=1, num_test=6)
    files = [w for s in ("pretrain", "finetune") for w in ("--llava-json", folder / f"{s}.json")]
    run("shards", "pack", *files, "--images", folder / "images", "--output", folder / "data")
    teachers = [
        word
        for name in ("clip", "convnext")
        for word in ("--teacher", PIPELINE / f"teachers/{name}.yaml")
    ]
    store = ["--shards", folder / "data", "--cache", folder / "cache"]
    run("cache", "build", *teachers, *store)
    cache = ["--cache", folder / "cache"]
    run(*training("pretrain", folder), *cache)
    run(*training("finetune", folder, f"init_from={folder / 'pretrain'}"), *cache)
    return folder


def test_training_leaves_config_log_curves_and_model(trained):
    for stage in ("pretrain", "finetune"):
        output = trained / stage
        log = json.loads((output / "log.json").read_text())
        steps = [entry for entry in log if "loss" in entry]
        assert [entry["step"] for entry in steps] == [1, 2]
        assert {"loss_text", "loss_kd", "loss_kd_convnext", "loss_balance", "token_std"} <= set(
            steps[0]
        )
        assert list(output.rglob("events.out.tfevents.*"))
        assert (output / "config.yaml").read_text() == (output / "model/config.yaml").read_text()
    assert (trained / "finetune/model/language_model.safetensors").exists()


def test_evaluate_prints_and_writes_scores(trained):
    words = ["evaluate", trained / "finetune", "--questions", trained / "test.json"]
    words += ["--images", trained / "images", "--max-new-tokens", 4]
    answers = trained / "answers.jsonl"
    scores = json.loads(run(*words, "--json", "--batch-size", 4, "--answers", answers))
    assert scores["all"]["total"] == 6
    assert sum(score["total"] for name, score in scores.items() if name != "all") == 6
    low, high = scores["all"]["interval"]
    assert low <= scores["all"]["accuracy"] <= high
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [f"test_{n:05d}" for n in range(6)]
    again = json.loads(run(*words, "--json", "--batch-size", 1))
    assert again == scores
    assert "question type" in run(*words)


def test_ask_answers_about_an_image(trained):
    image = trained / "images/test_00000.png"
    words = ["ask", trained / "finetune", image, "What is the sum?", "--max-new-tokens", 3]
    assert run(*words).strip()
    assert run(*words) == run(*words)
    with pytest.raises(ConfigError, match=r"none\.png does not exist"):
        run("ask", trained / "finetune", trained / "none.png", "What?")


def test_dry_run_prints_the_resolved_config_and_writes_nothing(trained):
    words = training("pretrain", trained)
    words[words.index("--output") + 1] = trained / "dry"
    printed = run(*words, "--dry-run")
    assert printed.strip() == (trained / "pretrain/config.yaml").read_text().strip()
    assert not (trained / "dry").exists()


def test_dry_run_says_how_many_are_held_out(trained):
    held = ("data.val_size=0.25", "training.eval_steps=1")
    for stage in ("pretrain", "finetune"):
        words = [*training(stage, trained, *held), "--dry-run"]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0
        first, second, third = done.stderr.splitlines()
        assert first == "movekd: 2 conversations are held out, 6 are trained on."
        assert second.startswith("movekd: 0 of 6 conversations cut at")
        assert third.startswith("movekd: 0 of 2 held-out conversations cut at")


def test_dry_run_says_how_full_packed_rows_are(trained):
    words = [*training("finetune", trained, "data.packing=true"), "--dry-run"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0
    assert re.fullmatch(
        r"movekd: 8 conversations are packed into 1 row of at most 2,048 tokens, 8\.00 per row; "
        r"0\.0% of the positions are padding in batches of \d+, and \d\d\.\d% would be if .*",
        done.stderr.splitlines()[-1],
    )


def test_samples_are_shown_and_nothing_is_written(trained):
    words = training("finetune", trained)
    words[words.index("--output") + 1] = trained / "shown"
    printed = run(*words, "--show-samples", 3)
    assert printed.count("<image>x36") == 3
    assert printed.count("[[ ") >= 3
    assert "3 of 8 samples" in printed
    samples = json.loads(run(*words, "--show-samples", 20, "--json"))
    assert len(samples) == 8
    for sample in samples:
        assert len(sample["input_ids"]) == len(sample["labels"]) == len(sample["pieces"])
    assert not (trained / "shown").exists()


def test_what_a_resume_does_is_said(trained, tmp_path, monkeypatch):
    """Into a folder without a run; after Ctrl-C without and with a checkpoint."""
    words = training("pretrain", trained, "training.save_strategy=steps", "training.save_steps=1")
    words[words.index("--output") + 1] = tmp_path / "run"
    words += ["--cache", trained / "cache"]
    compute_loss = DistillTrainer.compute_loss

    def interrupted_at(step):
        def interrupt(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return compute_loss(self, *args, **kwargs)

        monkeypatch.setattr(DistillTrainer, "compute_loss", interrupt)
        return CliRunner().invoke(app, [str(word) for word in [*words, "--resume"]])

    done = interrupted_at(0)
    assert done.exit_code == 130
    first, last = done.stderr.splitlines()
    assert (
        first == f"movekd: {tmp_path / 'run'} holds no run to resume: it starts from the beginning."
    )
    assert last == (
        "movekd: interrupted. No checkpoint was saved yet, so --resume starts from the beginning."
    )
    done = interrupted_at(1)
    assert done.exit_code == 130
    first, last = done.stderr.splitlines()
    assert first.endswith("holds no checkpoint yet: it starts from the beginning.")
    assert last == "movekd: interrupted. checkpoint-1 stays; --resume continues from it."
    assert interrupted_at(2).stderr == ""


def test_an_error_is_one_sentence_and_exit_code_2(tmp_path):
    words = training("pretrain", tmp_path, "distill.kd_weigth=1")
    done = subprocess.run(
        [sys.executable, "-m", "movekd", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("movekd: ")
    assert len(done.stderr.splitlines()) == 1
    assert "Did you mean 'kd_weight'?" in done.stderr
