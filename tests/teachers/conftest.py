"""Every shipped spec in a configuration small enough for a test; the loading code is the same."""

from collections.abc import Callable
from typing import Any

import pytest

from movekd.cache.spec import CacheSpec, load_spec

SHRUNKEN: dict[str, dict[str, Any]] = {
    "clip": {
        "image_size": 56,
        "model_args": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
    "eva02": {
        "image_size": 64,
        "model_args": {
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 4,
            "global_blocks": [2],
            "base_grid": 4,
            "pretrain_grid": 3,
        },
    },
    "eva02_clip": {
        "image_size": 56,
        "model_args": {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 4},
    },
    "convnext": {
        "image_size": 64,
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]},
    },
    "sam": {
        "image_size": 64,
        "model_args": {
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "global_attn_indexes": [1],
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "output_channels": 16,
            "initializer_range": 0.02,
        },
    },
    "pix2struct": {
        "image_size": 64,
        "model_args": {
            "model_type": "pix2struct_vision_model",
            "hidden_size": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_embed_hidden_size": 12,
            "seq_len": 64,
        },
    },
    "siglip2": {
        "image_size": 56,
        "model_args": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
    "dinov2": {
        "image_size": 56,
        "model_args": {
            "model_type": "dinov2_with_registers",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_register_tokens": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
    "dinov3": {
        "image_size": 64,
        "model_args": {
            "model_type": "dinov3_vit",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_register_tokens": 4,
            "patch_size": 16,
        },
    },
    "radio": {
        "image_size": 64,
        "model_args": {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 4},
    },
}
"""Shipped spec -> what makes it small."""


@pytest.fixture
def shrunken() -> Callable[..., CacheSpec]:
    """A shipped spec by name, shrunken, with random weights unless keywords say otherwise."""

    def shrink(name: str, **changes: Any) -> CacheSpec:
        content = load_spec(name).model_dump()
        changed = {**content, "weights": "random", **SHRUNKEN[name], **changes}
        return CacheSpec.model_validate(changed)

    return shrink


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
