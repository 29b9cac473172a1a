"""A loss term that is registered outside of movekd trains like movekd's own."""

import re
from pathlib import Path

import pytest
import torch

from movekd.distill import LossTermConfig, register_loss_term
from movekd.distill.loss_terms import LOSS_TERMS
from movekd.errors import ConfigError


class NormConfig(LossTermConfig):
    power: int = 2


def token_norm(output, keys):
    """Return the sum over images of the mean power of the student's tokens."""
    return output.student_IND.float().abs().pow(keys.power).mean(dim=(1, 2)).sum()


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr("movekd.distill.loss_terms.LOSS_TERMS", dict(LOSS_TERMS))
    register_loss_term("token_norm", token_norm, config=NormConfig)


def with_weight(weight, *more):
    return (f"loss_terms={{token_norm: {{weight: {weight}}}}}", *more)


def test_it_is_logged_as_its_mean_and_added_with_its_weight(digits, tmp_path):
    entry = digits.logged(digits.train(tmp_path, "pretrain", *with_weight(0.25)))[0]
    config = digits.config("pretrain", *with_weight(0.25))
    assert config.loss_terms == {"token_norm": {"weight": 0.25, "power": 2}}
    parts = (1, "text"), (2, "kd"), (0.01, "balance"), (0.25, "token_norm")
    expected = sum(weight * entry[f"loss_{name}"] for weight, name in parts)
    assert entry["loss"] == pytest.approx(expected, abs=1e-4)  # Trainer rounds it
    plain = digits.logged(digits.train(tmp_path / "plain", "pretrain"))[0]
    assert entry["loss_kd"] == plain["loss_kd"]
    assert "loss_token_norm" not in plain


def test_its_gradient_arrives(digits, tmp_path):
    last = {}
    for weight in (0, 5):
        run = digits.train(tmp_path / str(weight), "pretrain", *with_weight(weight))
        last[weight] = digits.logged(run)[-1]["loss_token_norm"]
    assert last[5] < last[0]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])  # finetune has samples without images
def test_accumulation_does_not_change_it(digits, tmp_path, stage):
    runs = {}
    for size in (4, 1):
        batch = (
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={4 // size}",
            "student.mole.balance_weight=0",  # F of the balance loss is that of a micro-batch
            "student.mole.lora_dropout=0",
            "data.group_by_modality_length=false",
        )
        run = digits.train(tmp_path / str(size), stage, *with_weight(0.5, *batch))
        runs[size] = [entry["loss_token_norm"] for entry in digits.logged(run)]
    assert len(runs[4]) >= 4
    assert runs[1] == pytest.approx(runs[4], rel=1e-3)


def test_a_resumed_run_ends_as_an_uninterrupted_one(digits, tmp_path):
    def stop(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    keys = with_weight(0.5, "training.save_strategy=steps", "training.save_steps=1")
    whole = digits.train(tmp_path / "whole", "pretrain", *keys)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "pretrain", *keys, progress=stop)
    with pytest.raises(ConfigError, match=r"another config: loss_terms.token_norm.weight differ"):
        digits.train(tmp_path / "parts", "pretrain", *with_weight(0.4), resume=True)
    parts = digits.train(tmp_path / "parts", "pretrain", *keys, resume=True)
    assert digits.logged(parts) == digits.logged(whole)
    first, second = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_sees_targets_labels_and_the_language_models_output(digits, tmp_path):
    seen = []

    def look(output, keys):
        clip, logits = output.targets["clip"], output.text_output.logits
        seen.append((len(clip), logits.shape[0], output.labels.shape[0]))
        return logits.float().square().mean(dim=(1, 2)).sum()

    register_loss_term("look", look)
    digits.train(tmp_path, "pretrain", "loss_terms={look: {weight: 0.1}}", "training.max_steps=1")
    assert seen == [(4, 4, 4)]


def test_it_works_without_distillation(digits, tmp_path):
    run = digits.train(tmp_path, "pretrain", "distill=null", *with_weight(0.1))
    assert all(entry["loss_token_norm"] > 0 for entry in digits.logged(run))


def test_an_unregistered_name_is_refused(digits):
    with pytest.raises(ConfigError, match=r"loss_terms names 'token_nrm'.*'token_norm'"):
        digits.config("pretrain", "loss_terms={token_nrm: {weight: 1}}")


def test_the_example_of_the_docs_runs(digits, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "register_loss_term" in block]
    config = digits.config("pretrain", "training.max_steps=1")
    (tmp_path / "student.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (tmp_path / "cache").symlink_to(digits.cache)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "training.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0
