"""Tests of movekd.student.image_size: a resized tower is what its own class interpolates."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, ViTConfig, ViTModel

from movekd.errors import ConfigError
from movekd.student.config import StudentConfig
from movekd.student.image_size import choose_image_size, resize_tower
from movekd.student.towers import TOWERS as TYPES
from movekd.student.towers import TowerType, num_prefix_tokens, register_tower
from small_tower import TOWERS, build_tower

OWN = 48


def pixels(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


def hidden_states(tower, size, **kwargs):
    with torch.no_grad():
        return tower(pixels(size), output_hidden_states=True, **kwargs).hidden_states


def interpolated(tower, size):
    """Return what the stock class computes at a size that is not its own."""
    takes_key = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    return hidden_states(tower, size, **({"interpolate_pos_encoding": True} if takes_key else {}))


@pytest.mark.parametrize("size", [32, 40, 64])
@pytest.mark.parametrize("name", TOWERS)
def test_a_resized_tower_computes_what_its_class_interpolates(tmp_path, name, size):
    expected = interpolated(build_tower(name, OWN).eval(), size)
    tower = build_tower(name, OWN).eval()
    resize_tower(tower, size)
    assert tower.config.image_size == size
    for found, wanted in zip(hidden_states(tower, size), expected, strict=True):
        assert torch.equal(found, wanted)
    assert expected[0].shape[1] == (size // 8) ** 2 + num_prefix_tokens(tower.config)
    tower.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path).eval()
    assert stock.config.image_size == size
    for found, wanted in zip(hidden_states(stock, size), expected, strict=True):
        assert torch.equal(found, wanted)  # without interpolation


@pytest.mark.parametrize("name", TOWERS)
def test_the_own_size_changes_nothing(name):
    tower = build_tower(name, OWN)
    embeddings = tower.embeddings
    resize_tower(tower, OWN)
    assert tower.embeddings is embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_in_half_precision_gets_the_table_of_float32(name, dtype):
    exact, half = build_tower(name, OWN).to(dtype).float(), build_tower(name, OWN).to(dtype)
    for tower in (exact, half):
        resize_tower(tower, 64)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    state = half.state_dict()
    for key, tensor in exact.state_dict().items():
        assert torch.equal(state[key], tensor.to(dtype)), key


@pytest.mark.parametrize("name", TOWERS)
def test_only_the_table_of_positions_changes(name):
    tower, expected = build_tower(name, OWN), build_tower(name, OWN).state_dict()
    resize_tower(tower, 64)
    state = tower.state_dict()
    assert state.keys() == expected.keys()
    kind = TYPES[tower.config.model_type]
    changed = {key for key in state if not torch.equal(state[key], expected[key])}
    assert changed == ({f"embeddings.{kind.positions}"} if kind.positions else set())


def choose(size, **keys):
    tower = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    config = StudentConfig(vision_tower="the/tower", image_size=size)
    return choose_image_size(config, SimpleNamespace(**(tower | keys)))


def test_null_and_the_own_size_are_the_towers_own():
    assert choose(None) == choose(336) == 336
    assert choose(None, image_size=384) == choose(384, image_size=384) == 384  # SigLIP: 384 / 14
    assert choose(448) == 448


@pytest.mark.parametrize(
    ("size", "keys", "message"),
    [
        (450, {}, r"image_size is 450, but the patches of 'the/tower' have 14 .*: 448 or 462\."),
        (5, {}, r"expected a multiple of 14\. Set student\.image_size: 14\."),
        (None, {"image_size": [336, 448]}, r"has image_size \[336, 448\] and patch_size 14"),
        (336, {"patch_size": (14, 16)}, r"patch_size \(14, 16\); expected one number each"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(size, keys, message):
    with pytest.raises(ConfigError, match=message):
        choose(size, **keys)


def test_a_registered_tower_that_says_nothing_of_positions_keeps_its_size():
    register_tower("vit", TowerType("ViT", num_special=1, blocks="layers"))
    try:
        assert choose(None, model_type="vit") == 336
        with pytest.raises(ConfigError, match=r"type 'vit' names neither a table of positions nor"):
            choose(448, model_type="vit")
        positions = "position_embeddings"
        entry = TowerType("ViT", num_special=1, blocks="layers", positions=positions)
        register_tower("vit", entry)
        keys = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = ViTConfig(intermediate_size=16, image_size=OWN, patch_size=8, **keys)
        torch.manual_seed(0)
        tower = ViTModel(config).eval()
        expected = interpolated(tower, 64)
        resize_tower(tower, 64)
        assert torch.equal(hidden_states(tower, 64)[-1], expected[-1])
    finally:
        TYPES.pop("vit", None)
