"""Tests of movekd.train.recipes: a run keeps the values with which its recipe began it."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.errors import ConfigError
from movekd.train.config import load_config
from movekd.train.recipes import LORA_SCALE, RECIPES, keep_values
from movekd.train.trained_keys import TOWER_RATE

LATER = {"mole": {"use_gate": False}, "distill": {"kd_weight": 0.25}}


@pytest.fixture
def later_recipe(monkeypatch):
    """Return a function after which `revised` sets other values, as in a later version."""

    def change():
        for part, values in LATER.items():
            for key, value in values.items():
                assert RECIPES["revised"][part][key] != value
                monkeypatch.setitem(RECIPES["revised"][part], key, value)
        monkeypatch.setitem(LORA_SCALE, "revised", 8)
        monkeypatch.setitem(TOWER_RATE, "revised", 3e-4)

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
    del content["student"]["mole"]["lora_alpha"], content["trained"], content["learning_rates"]
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(content))
    later_recipe()

    command = ["train", "--config", str(tmp_path / "student.yaml"), "--cache", str(digits.cache)]
    command += ["--output", str(tmp_path / "parts"), "--resume"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if "recipe revised sets" in line]
    assert len(said) == 4
    r = begun["student"]["mole"]["r"]
    alpha = f"student.mole.lora_alpha is {4.0 * r} in this run; recipe revised sets {8.0 * r} today"
    assert any(alpha in line for line in said)
    rate = "learning_rates.vision_tower is 0.0001 in this run; recipe revised sets 0.0003 today"
    assert any(rate in line for line in said)
    one, two = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)

    # a new run has the new values
    new = load_config(tmp_path / "student.yaml")
    assert new.student.mole.lora_alpha == 8 * r
    assert new.learning_rates.given() == {"vision_tower": 3e-4}


def test_what_the_config_says_itself_is_not_the_recipes(digits, tmp_path, later_recipe):
    config = digits.config("pretrain", "distill.kd_weight=2.0")
    begun = yaml.safe_load(config.to_yaml())
    later_recipe()
    given = {"recipe": "revised", "stage": "pretrain", "student": {}}
    given |= {"distill": {"kd_weight": 0.5}, "trained": begun["trained"]}
    lines = keep_values(given, begun)
    assert given["distill"]["kd_weight"] == 0.5  # and the resume is refused, by its key
    assert given["student"]["mole"]["use_gate"] is True
    assert [line.partition(" ")[0] for line in lines] == [
        "student.mole.lora_alpha",
        "student.mole.use_gate",
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    with pytest.raises(ConfigError, match=r"another config: distill\.kd_weight, learning_rates"):
        digits.train(tmp_path / "run", "pretrain", "distill.kd_weight=0.5", resume=True)


def test_a_run_that_began_without_the_tower_goes_on_without_it(digits):
    begun = yaml.safe_load(digits.config("pretrain", "recipe=revised_2026_11").to_yaml())
    begun["recipe"] = "revised"  # as it was in November 2026
    given = {"recipe": "revised", "stage": "pretrain", "student": {}, "distill": {}}
    lines = keep_values(given, begun)
    assert given["trained"] == ["mole", "projector"]
    assert "learning_rates" not in given
    assert [line.partition(" in this run")[0] for line in lines] == [
        f"student.mole.lora_alpha is {float(begun['student']['mole']['r'])}",
        "trained is ['mole', 'projector']",
    ]
    assert lines[1].endswith("sets ['mole', 'projector', 'vision_tower'] today.")
    named = given | {"trained": ["mole"]}
    assert keep_values(named, begun) == []
    assert named["trained"] == ["mole"]


@pytest.mark.parametrize(
    "content",
    [
        {"recipe": "official", "student": {}},
        {"student": {}},
        {"recipe": "revised", "student": {"mole": None}, "distill": None, "trained": ["projector"]},
        {"recipe": "revised", "student": {"mole": None}, "trained": ["projector"]},
    ],
)
def test_other_recipes_and_null_sections_are_left_as_they_are(digits, content):
    begun = yaml.safe_load(digits.config("pretrain").to_yaml())
    before = yaml.safe_dump(content)
    assert keep_values(content, begun) == []
    assert yaml.safe_dump(content) == before
