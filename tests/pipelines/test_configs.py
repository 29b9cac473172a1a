"""`movekd train` accepts every shipped student.yaml, and each names its recipe."""

from pathlib import Path

import pytest

from movekd.config import read_yaml
from movekd.resources import resource_dir
from movekd.train.config import TrainConfig, load_config
from movekd.train.recipes import RECIPES

CONFIGS = sorted(
    path
    for stage in ("distill", "pretrain", "finetune")
    for path in resource_dir("pipelines").glob(f"*/{stage}.yaml")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_resolves_to_its_recipe(path: Path) -> None:
    config = load_config(path)
    given = read_yaml(path)
    assert "recipe" in given
    for part, resolved in (("mole", config.student.mole), ("distill", config.distill)):
        if resolved is None:  # no experts: the file says so
            assert given["student"]["mole"] is None
            continue
        source = given.get("distill", {}) if part == "distill" else given["student"].get("mole", {})
        for key, value in RECIPES[config.recipe][part].items():
            if key not in source and value is not None:
                assert getattr(resolved, key) == value
            assert getattr(resolved, key) is not None


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_published_settings(stage: str, version: str) -> None:
    config = load_config(resource_dir("pipelines") / f"llava15_{version}" / f"{stage}.yaml")
    assert config.recipe == "official"
    assert config.distill is not None
    fourth = ["sam"] if version == "v1.1" else []
    assert config.distill.teachers == ["clip", "eva02", "convnext", *fourth]
    assert config.student.mole is not None
    assert (config.student.mole.num_experts, config.student.mole.r) == (3, 32)
    assert config.student.mole.lora_alpha == 1
    assert config.student.prompt == {"pretrain": "plain", "finetune": "v1"}[stage]
    assert config.training["learning_rate"] == {"pretrain": 1e-3, "finetune": 2e-5}[stage]
    assert config.data.group_by_modality_length is (stage == "finetune")


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(resource_dir("pipelines") / "digits" / "finetune.yaml")
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert isinstance(again, TrainConfig)
    assert again == config
