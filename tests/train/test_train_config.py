"""Tests of movekd.train.config."""

from pathlib import Path

import pytest
import yaml

from movekd.errors import ConfigError
from movekd.train.config import TrainConfig, load_config
from movekd.train.recipes import RECIPES, mole_defaults

MINIMAL = {
    "recipe": "revised",
    "stage": "pretrain",
    "student": {"vision_tower": "openai/clip", "language_model": "lmsys/vicuna"},
    "distill": {"teachers": ["clip", "eva02"]},
    "data": {"shards": "data"},
}


@pytest.fixture
def write(tmp_path):
    """Write a student.yaml with some keys changed; return its path."""

    def write(**changes):
        path = tmp_path / "student.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | changes))
        return path

    return write


@pytest.mark.parametrize("recipe", ["official", "revised"])
@pytest.mark.parametrize("stage", ["distill", "pretrain", "finetune"])
def test_a_resolved_run_reads_back_as_itself(write, tmp_path, recipe, stage):
    config = load_config(write(recipe=recipe, stage=stage))
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert again.resolved() == config
    assert again.to_yaml() == config.to_yaml()


@pytest.mark.parametrize(
    ("recipe", "alpha_of_16"), [("official", 1), ("revised", 64), ("revised_2026_11", 16)]
)
def test_a_recipe_fills_every_key_in_which_recipes_differ(write, recipe, alpha_of_16):
    config = load_config(write(recipe=recipe), ["student.mole.r=16"])
    for key, value in RECIPES[recipe]["distill"].items():
        assert getattr(config.distill, key) == value
    mole = mole_defaults(recipe, 16)
    for key, value in mole.items():
        assert getattr(config.student.mole, key) == value
    assert mole["lora_alpha"] == alpha_of_16
    assert RECIPES["official"]["distill"].keys() == RECIPES[recipe]["distill"].keys()
    assert mole_defaults("official", 16).keys() == mole.keys()


def test_only_the_revised_recipe_trains_the_tower_in_stage_1_and_at_its_own_rate(write):
    def learns(*overrides, **changes):
        config = load_config(write(**changes), list(overrides))
        rates = config.learning_rates
        return config.trained, None if rates is None else rates.given()

    both = ["mole", "projector"]
    assert learns() == ([*both, "vision_tower"], {"vision_tower": 1e-4})
    assert learns("recipe=revised_2026_11") == (both, None)
    assert learns(recipe="official") == (both, None)
    # what the file says wins, and the other rates stay
    rates = "learning_rates={vision_tower: 2.0e-5, projector: 1.0e-3}"
    assert learns(rates)[1] == {"vision_tower": 2e-5, "projector": 1e-3}
    rates = "learning_rates={projector: 2.0e-3}"
    assert learns(rates)[1] == {"vision_tower": 1e-4, "projector": 2e-3}
    assert learns("trained=[mole, projector]") == (both, None)
    named = "trained=[mole, projector, vision_tower]"
    assert learns(named) == ([*both, "vision_tower"], None)  # at training.learning_rate
    assert learns("student.mole=null") == (["projector"], None)
    assert learns(stage="finetune")[1] is None


def test_a_key_in_the_yaml_wins_over_the_recipe(write):
    config = load_config(
        write(recipe="official"),
        ["distill.kd_weight=0", "student.mole.use_gate=true", "student.mole.lora_alpha=8"],
    )
    assert config.distill.kd_weight == 0
    assert config.student.mole.use_gate is True
    assert config.student.mole.lora_alpha == 8
    assert config.distill.adapters == "teacher"


def test_a_stage_decides_prompt_grouping_and_parts(write):
    first, second = load_config(write()), load_config(write(stage="finetune"))
    assert (first.student.prompt, second.student.prompt) == ("plain", "v1")
    assert (first.data.group_by_modality_length, second.data.group_by_modality_length) == (
        False,
        True,
    )
    assert first.trained == ["mole", "projector", "vision_tower"]
    assert second.trained == ["mole", "projector", "vision_tower", "language_model"]
    assert load_config(write(), ["student.mole=null"]).trained == ["projector"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.kd_weigth=1", r"unknown key 'distill\.kd_weigth'.*Did you mean 'kd_weight'"),
        ("student.mole.num_expert=1", r"'student\.mole\.num_expert'.*Did you mean 'num_experts'"),
        ("recip=official", r"unknown key 'recip'.*Did you mean 'recipe'"),
        (
            "recipe=offical",
            r"'revised' or 'revised_2026_11' \(found 'offical'\)\. Did you mean 'official'",
        ),
        ("stage=null", r"stage: "),
        ("data.geometry=round", r"data\.geometry: .*found 'round'"),
        ("distill.teachers=[]", r"distill\.teachers: "),
        ("distill.teachers=[clip, clip]", r"a teacher is named twice"),
        ("distill.anchor=clib", r"anchor 'clib' is not among .*Did you mean 'clip'"),
        ("distill.grid=native", r"adapters: student .*needs distill\.grid: student"),
        (
            "distill.teacher_weighting=anchor",
            r"anchor compares .*and adapters: student adapts none",
        ),
        (
            "distill={teachers: [clip], adapters: teacher, grid: native, "
            "teacher_weighting: similarity}",
            r"similarity .*needs distill\.grid: student",
        ),
        ("training.output_dir=x", r"training: 'output_dir' is set by movekd train"),
        ("student.image_mean=[0, 0, 0]", r"image_mean and image_std go together"),
        ("no equals sign", r"--set 'no equals sign' is not of the form a\.b=c"),
        ("distill.teachers=[clip", r"is not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(), [override])


def test_the_anchors_share_is_the_released_one_unless_given(write):
    assert load_config(write(recipe="official")).distill.anchor_share == 0.8
    assert load_config(write(recipe="revised")).distill.anchor_share is None  # equal shares
    given = load_config(write(recipe="official"), ["distill.anchor_share=0.5"])
    assert given.distill.anchor_share == 0.5
    with pytest.raises(ConfigError, match=r"anchor_share is 0\.5, but teacher_weighting: equal"):
        load_config(write(recipe="revised"), ["distill.anchor_share=0.5"])
    with pytest.raises(ConfigError, match=r"distill\.anchor_share"):
        load_config(write(recipe="official"), ["distill.anchor_share=1.5"])


def test_parts_that_are_not_there_cannot_learn(write):
    with pytest.raises(ConfigError, match=r"trained names 'mole', but student\.mole is null"):
        load_config(write(), ["student.mole=null", "trained=[mole]"])


def test_a_missing_key_is_named(write):
    with pytest.raises(ConfigError, match=r"key 'student\.vision_tower' is missing"):
        load_config(write(student={"language_model": "x"}))
    with pytest.raises(ConfigError, match=r"key 'student\.language_model' is missing.*pretrain"):
        load_config(write(student={"vision_tower": "x"}))


def test_distill_trains_the_encoder_and_needs_no_language_model(write):
    config = load_config(write(stage="distill", student={"vision_tower": "x"}))
    assert config.trained == ["mole"]
    assert config.student.language_model is None
    assert load_config(write(stage="distill")).student.language_model is None
    plain = load_config(write(stage="distill"), ["student.mole=null"])
    assert plain.trained == ["vision_tower"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill=null", r"learns only from cached targets, but distill is null"),
        ("trained=[mole, projector]", r"trained names projector, which stage: distill does not"),
        ("data.conversations=[a.json]", r"takes every image of data\.shards and reads no text"),
        (
            "data.group_by_modality_length=true",
            r"groups samples by their text, and stage: distill reads none",
        ),
    ],
)
def test_distill_refuses_what_belongs_to_text(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(stage="distill"), [override])


def test_overrides_are_yaml_and_reach_any_depth(write):
    config = load_config(
        write(),
        ["training.learning_rate=2e-5", "training.seed=3", "training.bf16=true", "distill=null"],
    )
    assert config.training == {"learning_rate": 2e-5, "seed": 3, "bf16": True}
    assert config.distill is None
    assert load_config(write(), ["distill=null", "distill.teachers=[clip]"]).distill is not None


def test_numbers_with_an_exponent_are_numbers(write):
    training = {"learning_rate": "2e-5", "run_name": "e5", "adam_epsilon": "1.5E-8"}
    config = load_config(write(training=training))
    assert config.training == {"learning_rate": 2e-5, "run_name": "e5", "adam_epsilon": 1.5e-8}


def test_paths_beside_the_yaml_become_absolute_and_hub_ids_stay(write, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    config = load_config(write())
    assert config.data.shards == tmp_path / "data"
    assert config.student.vision_tower == "openai/clip"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "here").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert load_config(write(), ["data.shards=here"]).data.shards == elsewhere / "here"
    assert load_config(write(), ["data.shards=gone"]).data.shards == Path("gone")


def test_every_key_is_described():
    def undescribed(model, path=""):
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            models = [k for k in kinds if isinstance(k, type) and hasattr(k, "model_fields")]
            for inner in models:
                yield from undescribed(inner, f"{path}{name}.")
            if not models and not field.description:
                yield path + name

    assert list(undescribed(TrainConfig)) == []
