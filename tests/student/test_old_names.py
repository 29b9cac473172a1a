"""Configs and exports that were written before each MoLE key had one name still load."""

import json

import pytest
import torch
import yaml
from transformers import AutoModel

from exports import export
from movekd.config import validate
from movekd.errors import ConfigError
from movekd.student import register_auto_classes
from movekd.student.checkpoint import load_student
from movekd.student.config import MoleKeys
from movekd.train.config import load_config
from movekd.train.run_dir import plan_start

OLD_YAML = """\
recipe: revised
stage: pretrain
student:
  vision_tower: org/tower
  language_model: org/language-model
  mole:
    r: 8
    last_block: LAST_BLOCK
data:
  shards: data
"""

OLD_RUN = """\
recipe: revised
stage: pretrain
student:
  architecture: llava
  vision_tower: org/tower
  language_model: org/language-model
  vision_feature_layer: -2
  projector_hidden_act: gelu
  mole:
    num_experts: 3
    r: 8
    lora_alpha: 8.0
    lora_dropout: 0.05
    use_gate: true
    init_lora_weights: zero
    last_block: false
    balance: batch
    balance_weight: 0.01
  prompt: plain
  image_mean: null
  image_std: null
  dtype: float32
distill: null
data:
  shards: data
  conversations: []
  geometry: crop
  group_by_modality_length: false
  model_max_length: 2048
init_from: null
trained:
- mole
- projector
training: {}
"""
"""config.yaml of a run, as ``to_yaml`` wrote it."""

OLD_TOWER = {
    "architectures": ["MovekdClipVisionModel"],
    "attention_dropout": 0.0,
    "dtype": "float32",
    "expert_alpha": 1.0,
    "expert_blocks": [0, 1, 2, 3, 4, 5],
    "expert_rank": 4,
    "hidden_act": "quick_gelu",
    "hidden_size": 96,
    "image_size": 48,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 288,
    "layer_norm_eps": 1e-05,
    "model_type": "movekd_clip_vision",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_experts": 3,
    "num_hidden_layers": 6,
    "patch_size": 8,
    "projection_dim": 512,
    "use_gate": False,
}
"""config.json of an exported encoder, as it was written."""


@pytest.mark.parametrize(
    ("old", "new"), [("true", "all"), ("false", "read"), ("null", "read")], ids=str
)
def test_last_block_of_a_yaml_file_is_read(tmp_path, old, new):
    path = tmp_path / "student.yaml"
    path.write_text(OLD_YAML.replace("LAST_BLOCK", old))
    config = load_config(path)
    assert config.student.mole.layers_to_transform == new  # null takes the recipe's value
    assert "last_block" not in config.to_yaml()
    path.write_text(OLD_YAML.replace("    last_block: LAST_BLOCK\n", ""))
    overridden = load_config(path, [f"student.mole.last_block={old}"])
    assert overridden.student.mole.layers_to_transform == new


def test_both_names_together_are_refused():
    keys = {"last_block": True, "layers_to_transform": "read"}
    with pytest.raises(ConfigError, match=r"both given; remove last_block"):
        validate(MoleKeys, keys, "student.yaml")
    with pytest.raises(ConfigError, match=r"last_block .*true or false.*layers_to_transform"):
        validate(MoleKeys, {"last_block": "perhaps"}, "student.yaml")


def test_a_run_with_the_old_name_is_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(OLD_RUN)
    for key in ("layers_to_transform: read", "last_block: false"):
        text = OLD_RUN.replace("last_block: false", key)
        (tmp_path / "student.yaml").write_text(text)
        config = load_config(tmp_path / "student.yaml")
        plan_start(config, tmp_path / "run", resume=True, overwrite=False)
    config = load_config(tmp_path / "student.yaml", ["student.mole.last_block=true"])
    with pytest.raises(ConfigError, match=r"layers_to_transform differ"):
        plan_start(config, tmp_path / "run", resume=True, overwrite=False)


def test_a_model_directory_with_the_old_name_is_loaded(kit, tmp_path):
    trained = kit.make_run(tmp_path, kit.REVISED)
    path = trained.directory / "config.yaml"
    run = yaml.safe_load(path.read_text())
    assert run["student"]["mole"].pop("layers_to_transform") == "read"
    run["student"]["mole"]["last_block"] = False
    path.write_text(json.dumps(run))
    kit.assert_same_weights(load_student(tmp_path).student.vlm, trained.student.vlm)


def test_an_old_export_is_loaded(kit, tmp_path):
    register_auto_classes()
    trained = kit.make_run(tmp_path / "run", kit.OFFICIAL)
    export(trained, "encoder", tmp_path / "encoder")
    expected = AutoModel.from_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/config.json").write_text(json.dumps(OLD_TOWER))
    found = AutoModel.from_pretrained(tmp_path / "encoder")
    assert (found.config.r, found.config.lora_alpha) == (4, 1.0)
    kit.assert_same_weights(found, expected)
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        tokens, again = (m.eval()(pixels).last_hidden_state for m in (found, expected))
    assert torch.equal(tokens, again)

    export(trained, "hf", tmp_path / "hf")
    keys = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(keys | {"vision_config": OLD_TOWER}))
    again = load_student(tmp_path / "hf")
    kit.assert_same_weights(again.student.vlm, trained.student.vlm)
    export(again, "encoder", tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["layers_to_transform"] == [0, 1, 2, 3, 4, 5]
    assert not [key for key in written if key.startswith("expert_")]
