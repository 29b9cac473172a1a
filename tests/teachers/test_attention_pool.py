"""What stands for [CLS] in SigLIP, against the libraries' own pooling heads."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError
from movekd.teachers import load_teacher
from movekd.teachers.attention_pool import find_pool, pool

Shrink = Callable[..., CacheSpec]


def sharpened(model: Any, *names: str) -> Any:
    """Give some projections scores far from uniform, so that a wrong row cannot pass."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.normal_(std=0.6)
    return model.eval()


def siglip() -> Any:
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )
    return sharpened(transformers.SiglipVisionModel(config), "in_proj_weight", "in_proj_bias")


def test_pool_of_transformers_equals_its_own_map_and_pooler_output() -> None:
    model = siglip()
    maps = []
    head = find_pool(model)
    assert head is not None

    def keep_map(attention: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        # Asked for each head; the model asks for no map at all, or for the mean over heads.
        maps.append(nn.MultiheadAttention.forward(attention, *args, average_attn_weights=False)[1])

    handle = head.attention.register_forward_hook(keep_map)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 28, 28))
        handle.remove()
        embedding_BC, row_BHN = pool(head, output.last_hidden_state)
    assert row_BHN.shape == (2, 4, 16)
    assert row_BHN.max() > 0.2
    torch.testing.assert_close(row_BHN, maps[0][:, :, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding_BC, output.pooler_output, atol=1e-6, rtol=0)
    torch.testing.assert_close(row_BHN.sum(-1), torch.ones(2, 4))


@pytest.mark.parametrize("extra", [{}, {"qk_norm": True}, {"pos_embed": "abs", "feat_size": 16}])
def test_pool_of_timm_equals_its_unfused_map_and_pooled_output(extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_siglip_224",
        img_size=28,
        patch_size=7,
        embed_dim=32,
        depth=2,
        num_heads=4,
    )
    model.attn_pool = timm.layers.AttentionPoolLatent(
        32, num_heads=4, norm_layer=nn.LayerNorm, **extra
    )
    sharpened(model, "attn_pool.q.weight", "attn_pool.kv.weight", "attn_pool.kv.bias")
    head: Any = find_pool(model)
    with torch.no_grad():
        tokens_BND = model.forward_features(torch.randn(2, 3, 28, 28))
        assert head.fused_attn
        embedding_BC, row_BHN = pool(head, tokens_BND)
        maps = []
        head.fused_attn = False
        softmax = torch.Tensor.softmax

        def keep_map(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            maps.append(softmax(logits, *args, **options))
            return maps[-1]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.Tensor, "softmax", keep_map)
            pooled_BC = model.forward_head(tokens_BND, pre_logits=True)
    assert row_BHN.max() > 0.2
    torch.testing.assert_close(row_BHN, maps[0][:, :, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding_BC, pooled_BC, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", ["last", -1, 1])
def test_teacher_gives_the_pooler_output_whatever_its_layer(layer: int | str) -> None:
    args = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    }
    spec = CacheSpec(
        name="siglip",
        provider="transformers",
        model="local/siglip",
        weights="random",
        model_args=args,
        image_size=28,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layer=layer,
        cls=True,
        cls_attention=True,
        cls_source="attention_pool",
    )
    teacher = load_teacher(spec)
    pixels_BCHW = torch.randn(2, 3, 28, 28)
    output = teacher(pixels_BCHW)
    with torch.inference_mode():
        expected = teacher.module(pixels_BCHW, output_hidden_states=True)
    assert output.cls_BD is not None
    assert output.cls_attention_BHN is not None
    torch.testing.assert_close(output.cls_BD, expected.pooler_output, atol=1e-6, rtol=0)
    hidden_BND = expected.last_hidden_state if layer == "last" else expected.hidden_states[layer]
    torch.testing.assert_close(output.tokens_BND, hidden_BND, atol=1e-6, rtol=0)
    alone = load_teacher(spec.with_changes(cls_attention=False))(pixels_BCHW)
    assert alone.cls_attention_BHN is None
    assert alone.cls_BD is not None


def test_siglip_of_timm_loads_with_its_pool() -> None:
    spec = CacheSpec(
        name="siglip",
        provider="timm",
        model="vit_so400m_patch14_siglip_384",
        weights="random",
        model_args={"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 4},
        image_size=56,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layer="last",
        cls=True,
        cls_attention=True,
        cls_source="attention_pool",
    )
    teacher = load_teacher(spec)
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    output = teacher(pixels_BCHW)
    with torch.inference_mode():
        pooled_BC = teacher.module.forward_head(
            teacher.module.forward_features(pixels_BCHW), pre_logits=True
        )
    assert output.cls_BD is not None
    torch.testing.assert_close(output.cls_BD, pooled_BC, atol=1e-6, rtol=0)


def test_several_probes_are_not_one() -> None:
    assert find_pool(timm.layers.AttentionPoolLatent(32, num_heads=4, latent_len=2)) is None
    assert find_pool(timm.layers.AttentionPoolLatent(32, num_heads=4, pool_type="avg")) is None


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "siglip2",
            {"cls_source": "token"},
            r"no \[CLS\] token\. Its attention-pooling head .*set",
        ),
        (
            "dinov3",
            {"cls_source": "attention_pool"},
            r"no attention-pooling head .*source: token\.",
        ),
        ("sam", {"cls": True, "cls_source": "attention_pool"}, r"no att.* Set both to false\."),
        ("convnext", {"cls": True}, r"no \[CLS\] token\. Set both to false\."),
    ],
)
def test_a_cls_that_is_not_there_is_refused_with_the_way_out(
    name: str, changes: dict[str, Any], said: str, shrunken: Shrink
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_teacher(shrunken(name, **changes))
