"""The [CLS] row against the full attention map of the library's own eager arithmetic."""

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from movekd.errors import ConfigError
from movekd.teachers.attention import find_attention, watch_cls_attention

SIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 7}


def transformers_model(model_type: str, **extra: Any) -> Any:
    config = transformers.AutoConfig.for_model(model_type, image_size=28, **SIDE, **extra)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():  # scores far from uniform, so that a wrong row cannot pass
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.normal_(std=0.6)
    return model


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    ("model_type", "extra", "num_prefix"),
    [
        ("clip_vision_model", {"intermediate_size": 48}, 1),
        ("dinov2", {}, 1),
        ("dinov2_with_registers", {"num_register_tokens": 3}, 4),
        ("dinov3_vit", {"num_register_tokens": 3, "intermediate_size": 48}, 4),
        ("dinov3_vit", {"num_register_tokens": 0, "intermediate_size": 48, "key_bias": True}, 1),
        ("vit", {"intermediate_size": 48}, 1),
    ],
)
def test_row_equals_the_eager_map_of_transformers(
    model_type: str, extra: dict[str, Any], num_prefix: int, index: int
) -> None:
    torch.manual_seed(0)
    model = transformers_model(model_type, **extra)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    rows: list[Tensor] = []
    handle = watch_cls_attention(find_attention(blocks[index]), num_prefix, rows.append)
    pixels_BCHW = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert model.config._attn_implementation == "sdpa"
        model(pixels_BCHW)
        handle.remove()
        model.set_attn_implementation("eager")
        maps_BHTT = model(pixels_BCHW, output_attentions=True).attentions[index]
    (row_BHN,) = rows  # one pass was watched, the other came after remove()
    assert row_BHN.shape == (2, 4, 16)
    assert row_BHN.max() > 0.2
    torch.testing.assert_close(row_BHN, maps_BHTT[:, :, 0, num_prefix:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}),
        ("eva02_tiny_patch14_224", {}),
        ("eva02_tiny_patch14_224", {"qkv_fused": True}),
        ("eva02_tiny_patch14_224", {"num_reg_tokens": 2}),
        ("eva02_large_patch14_clip_336", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_large_patch16_radio_v3", {}),
    ],
)
def test_row_equals_the_unfused_map_of_timm(model: str, extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = timm.create_model(
        model, img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=4, **extra
    ).eval()
    attention: Any = find_attention(network.blocks[1])
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.split(".")[0] in ("qkv", "q_proj", "k_proj", "q_bias"):
                parameter.normal_(std=0.6)
    num_prefix = network.num_prefix_tokens
    rows: list[Tensor] = []
    maps: list[Tensor] = []
    watch_cls_attention(attention, num_prefix, rows.append)
    attention.attn_drop.register_forward_hook(lambda _m, args, _out: maps.append(args[0]))
    pixels_BCHW = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert attention.fused_attn
        network.forward_features(pixels_BCHW)
        assert not maps  # the row came while the fused kernel ran, which shows no map
        attention.fused_attn = False
        network.forward_features(pixels_BCHW)
    expected_BHN = maps[0][:, :, 0, num_prefix:]
    assert expected_BHN.max() > 0.2
    torch.testing.assert_close(rows[0], expected_BHN, atol=1e-5, rtol=0)


def test_attention_with_other_arithmetic_is_refused() -> None:
    beit = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=32, depth=1)
    with pytest.raises(
        ConfigError, match=r"of type Block; known .*CLIPAttention.* cls_attention: f"
    ):
        find_attention(beit.blocks[0])
