"""Tests of movekd.student.towers: a tower is one entry, also one from outside of the package."""

import pytest
import torch
from transformers import AutoModel, ViTConfig, ViTModel

from exports import export
from movekd.errors import ConfigError
from movekd.student.checkpoint import load_student
from movekd.student.export.onnx import encoder_tokens
from movekd.student.parameters import mole_layers
from movekd.student.towers import TOWERS, TowerType, register_tower
from movekd.student.vlm import image_features


@pytest.fixture
def vit(tmp_path):
    """A ViT's directory; a test may register its type."""
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
    )
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(tmp_path / "tower")
    yield tmp_path / "tower"
    TOWERS.pop("vit", None)


def test_an_unknown_tower_is_refused_by_name(kit, vit, tmp_path):
    with pytest.raises(ConfigError, match=r"is a 'vit'; expected one of clip_vision_model"):
        kit.make_encoder_run(tmp_path / "run", kit.REVISED, vit)


def test_a_registered_tower_learns_and_is_exported(kit, vit, tmp_path):
    register_tower("vit", TowerType("ViT", num_special=1, blocks="layers"))
    run = kit.make_encoder_run(tmp_path / "run", kit.REVISED, vit)
    trained = load_student(run, takes_encoder=True)
    assert set(mole_layers(trained.student.vlm)) == {0, 1}
    pixels = torch.randn(2, 3, 48, 48)
    tokens_BND = image_features(trained.student.vlm, pixels)[1]
    assert tokens_BND.shape == (2, 36, 32)
    plain = load_student(kit.make_encoder_run(tmp_path / "plain", None, vit), takes_encoder=True)
    export(plain, "encoder", tmp_path / "out")
    encoder = AutoModel.from_pretrained(tmp_path / "out").eval()
    found = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(found, image_features(plain.student.vlm, pixels)[1])
    assert "it is a ViT without experts" in (tmp_path / "out/README.md").read_text()
    with torch.no_grad():
        written_BND, _ = encoder_tokens(plain)(pixels)
    torch.testing.assert_close(written_BND, found)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"num_special": 0},
            r"says that 0 tokens stand before the patches; expected 1.*num_special",
        ),
        (
            {"num_special": 2},
            r"says that 2 tokens stand before the patches; expected 1.*num_special",
        ),
        ({"blocks": "encoder.layer"}, r"has 'encoder.layer', and ViTModel has no such module"),
        ({"mlp": "ffn"}, r"has 'layers.0.ffn', and ViTModel has no such module"),
        ({"first_norm": "norm_pre"}, r"has 'norm_pre', and ViTModel has no such module"),
        ({"rotary": "rope"}, r"has 'rope', and ViTModel has no such module"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(kit, vit, tmp_path, entry, message):
    right = {"title": "ViT", "num_special": 1, "blocks": "layers"}
    register_tower("vit", TowerType(**(right | entry)))
    with pytest.raises(ConfigError, match=message):
        kit.make_encoder_run(tmp_path / "run", kit.REVISED, vit)
