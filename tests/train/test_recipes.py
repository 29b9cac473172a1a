"""Tests of movekd.train.recipes: a run keeps the values with which its recipe began it."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.errors import ConfigError
from movekd.train.config import load_config
from movekd.train.recipes import RECIPES, keep_values

LATER = {"mole": {"lora_alpha": 64.0, "use_gate": False}, "distill": {"kd_weight": 0.25}}


@pytest.fixture
def later_recipe(monkeypatch):
    """Return a function after which `revised` sets other values, as in a later version."""

    def change():
        for part, values in LATER.items():
            for key, value in values.items():
                assert RECIPES["revised"][part][key] != value
                monkeypatch.setitem(RECIPES["revised"][part], key, value)

    return change


def test_a_resume_keeps_what_the_recipe_set_when_the_run_began(digits, tmp_path, later_recipe):
    saving = ("training.save_strategy=steps", "training.save_steps=2")

    def stop(what, done, total):
        if what.startswith("train") and done == 4:
            raise KeyboardInterrupt

    digits.train(tmp_path / "whole", "pretrain", *saving)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "pretrain", *saving, progress=stop)
    begun = yaml.safe_load((tmp_path / "parts/config.yaml").read_text())
    content = yaml.safe_load((tmp_path / "parts/config.yaml").read_text())
    for part in (content["student"]["mole"], content["distill"]):
        for key in list(part):
            if any(key in defaults for defaults in RECIPES["revised"].values()):
                del part[key]  # as a user's file, which leaves them to the recipe
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(content))
    later_recipe()

    command = ["train", "--config", str(tmp_path / "student.yaml"), "--cache", str(digits.cache)]
    command += ["--output", str(tmp_path / "parts"), "--resume"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if "recipe revised sets" in line]
    assert len(said) == 3
    r = begun["student"]["mole"]["r"]
    assert f"student.mole.lora_alpha is {float(r)} in this run; recipe revised sets 64.0" in said[0]
    one, two = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)

    # a new run has the new values
    assert load_config(tmp_path / "student.yaml").student.mole.lora_alpha == 64


def test_what_the_config_says_itself_is_not_the_recipes(digits, tmp_path, later_recipe):
    config = digits.config("pretrain", "distill.kd_weight=2.0")
    begun = yaml.safe_load(config.to_yaml())
    later_recipe()
    given = {"recipe": "revised", "student": {}, "distill": {"kd_weight": 0.5}}
    lines = keep_values(given, begun)
    assert given["distill"]["kd_weight"] == 0.5  # and the resume is refused, by its key
    assert given["student"]["mole"]["use_gate"] is True
    assert [line.partition(" ")[0] for line in lines] == [
        "student.mole.lora_alpha",
        "student.mole.use_gate",
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    with pytest.raises(ConfigError, match=r"another config: distill\.kd_weight, student"):
        digits.train(tmp_path / "run", "pretrain", "distill.kd_weight=0.5", resume=True)


@pytest.mark.parametrize(
    "content",
    [
        {"recipe": "official", "student": {}},
        {"student": {}},
        {"recipe": "revised", "student": {"mole": None}, "distill": None},
        {"recipe": "revised", "student": {"mole": None}},
    ],
)
def test_other_recipes_and_null_sections_are_left_as_they_are(digits, content):
    begun = yaml.safe_load(digits.config("pretrain").to_yaml())
    before = yaml.safe_dump(content)
    assert keep_values(content, begun) == []
    assert yaml.safe_dump(content) == before
