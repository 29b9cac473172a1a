"""Tests of movekd.train.init_from: a stage goes on with the model that the earlier one trained."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from movekd.errors import ConfigError, WeightsError


@pytest.fixture(scope="module")
def first(digits, tmp_path_factory):
    """A finished stage 1."""
    output = tmp_path_factory.mktemp("first") / "run"
    digits.train(output, "pretrain", "training.max_steps=1")
    return output


def another_tower(digits, folder: Path):
    """Return a copy of the vision tower with one other number in its weights."""
    shutil.copytree(digits.config().student.vision_tower, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "student.mole.use_gate=false",
            r"student\.mole\.use_gate 'True', and this run has 'False'",
        ),
        ("student.mole.lora_alpha=1", r"student\.mole\.lora_alpha '64\.0'"),
        ("student.vision_feature_layer=-1", r"student\.vision_feature_layer '-2'"),
        ("student.projector_hidden_act=relu", r"student\.projector_hidden_act 'gelu'"),
    ],
)
def test_experts_that_compute_something_else_are_refused(digits, tmp_path, first, key, said):
    with pytest.raises(ConfigError, match=said):
        digits.train(tmp_path, "finetune", f"init_from={first}", key)


def test_another_base_is_refused_and_a_copy_of_the_same_is_not(digits, tmp_path):
    first = tmp_path / "first"
    digits.train(first, "pretrain", "trained=[mole, projector]", "training.max_steps=1")
    other = another_tower(digits, tmp_path / "other")
    begin = [f"init_from={first}", "training.max_steps=1"]
    with pytest.raises(ConfigError, match=r"student\.vision_tower .* do not fit this model"):
        digits.train(tmp_path / "run", "finetune", *begin, f"student.vision_tower={other}")
    copied = tmp_path / "copied"
    shutil.copytree(digits.config().student.vision_tower, copied)
    digits.train(tmp_path / "run", "finetune", *begin, f"student.vision_tower={copied}")


def test_a_base_whose_weights_the_earlier_stage_saved_need_not_be_the_same(digits, tmp_path):
    digits.train(tmp_path / "first", "finetune", "training.max_steps=1")
    other = another_tower(digits, tmp_path / "other")
    keys = [f"init_from={tmp_path / 'first'}", f"student.vision_tower={other}"]
    digits.train(
        tmp_path / "second", "finetune", *keys, "training.learning_rate=0", "training.max_steps=1"
    )
    one, two = digits.weights(tmp_path / "first"), digits.weights(tmp_path / "second")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_that_is_no_run_is_named(digits, tmp_path):
    with pytest.raises(WeightsError, match=r"init_from .* holds no `model` folder"):
        digits.train(tmp_path / "run", "finetune", f"init_from={tmp_path}")
