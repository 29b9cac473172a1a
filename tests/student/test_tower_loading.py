"""Tests of movekd.student.tower_loading: towers in checkpoints of all kinds."""

import json

import pytest
import torch
from transformers import CLIPModel, SiglipModel

import tower_cases
from movekd.errors import ConfigError, WeightsError
from movekd.student.config import StudentConfig
from movekd.student.tower_loading import (
    load_tower,
    own_image_size,
    read_tower_config,
    require_same_image_size,
    require_tile_size,
)
from small_tower import build_tower

CHECKPOINTS = {"CLIPModel": (CLIPModel, "CLIP")}
CHECKPOINTS["SiglipModel"] = (SiglipModel, "SigLIP, SigLIP 2 of fixed resolution")
ROWS = {case.title: case for case in tower_cases.CASES}


def config(folder, **keys):
    return StudentConfig(vision_tower=str(folder), **({"mole": None} | keys))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_tower_in_a_whole_checkpoint_is_found(tmp_path, name):
    model, title = CHECKPOINTS[name]
    ROWS[title].checkpoints[name](tmp_path)
    expected = model.from_pretrained(tmp_path).vision_model.state_dict()
    tower = load_tower(config(tmp_path))
    assert type(tower).__name__ == name.replace("Model", "VisionModel")
    state = tower.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def as_siglip2(folder):
    """Let a checkpoint say that it is a SigLIP 2 as a whole; its tower stays what it is."""
    ROWS["SigLIP, SigLIP 2 of fixed resolution"].checkpoints["SiglipModel"](folder)
    keys = json.loads((folder / "config.json").read_text())
    keys |= {"model_type": "siglip2", "architectures": ["Siglip2Model"]}
    (folder / "config.json").write_text(json.dumps(keys))
    return keys


def test_a_siglip_2_of_fixed_resolution_is_a_siglip(tmp_path):
    as_siglip2(tmp_path)
    tower = load_tower(config(tmp_path, image_size=32))
    assert type(tower).__name__ == "SiglipVisionModel"
    assert tower.config.image_size == 32
    assert tower.embeddings.position_embedding.weight.shape == (16, 16)


def test_naflex_weights_under_the_name_of_a_fixed_tower_are_refused(tmp_path):
    keys = as_siglip2(tmp_path)
    keys["vision_config"]["model_type"] = "siglip2_vision_model"
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match=r"is a 'siglip2_vision_model': .*NaFlex"):
        load_tower(config(tmp_path))


def test_the_image_size_is_known_before_weights_are_read(tmp_path):
    build_tower("dinov2", 48).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert read_tower_config(config(tmp_path)).image_size == 48
    assert read_tower_config(config(tmp_path, image_size=64)).image_size == 64
    assert own_image_size(config(tmp_path, image_size=64)) == 48
    with pytest.raises(ConfigError, match=r"image_size is 50.*Set student\.image_size: 48 or 56"):
        load_tower(config(tmp_path, image_size=50))
    with pytest.raises(WeightsError):
        load_tower(config(tmp_path, image_size=64))


def test_tiles_of_llava_next_need_their_size(tmp_path):
    tiles = config(tmp_path, architecture="llava_next", image_size=64)
    with pytest.raises(ConfigError, match=r"looks at 64 pixels; .*Set student\.image_size: 336"):
        require_tile_size(tiles, 64)
    require_tile_size(tiles, 336)
    require_tile_size(config(tmp_path), 64)


@pytest.mark.parametrize(
    ("earlier", "now", "is_right"),
    [
        (None, None, True),
        (None, 48, True),  # the tower's own
        (48, None, True),
        (64, 64, True),
        (64, None, False),
        (None, 64, False),
        (64, 32, False),
    ],
)
def test_a_trained_table_of_positions_has_its_size(tmp_path, earlier, now, is_right):
    build_tower("clip", 48).save_pretrained(tmp_path / "clip")
    build_tower("dinov3", 48).save_pretrained(tmp_path / "dinov3")
    keys = {} if earlier is None else {"image_size": earlier}  # an older run has no such key
    require_same_image_size(keys, config(tmp_path / "dinov3", image_size=now), "first")
    student = config(tmp_path / "clip", image_size=now)
    if is_right:
        require_same_image_size(keys, student, "first")
        return
    message = rf"first trained its vision tower at {earlier or 48} pixels.*image_size {now or 48}"
    with pytest.raises(ConfigError, match=message):
        require_same_image_size(keys, student, "first")
