"""Small vision towers with random weights, and MoLE configs for them."""

from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
REVISED: dict[str, Any] = {"num_experts": 3, "r": 2, "layers_to_transform": [0, 1]}
OFFICIAL: dict[str, Any] = {
    "num_experts": 3,
    "r": 2,
    "lora_alpha": 1.0,
    "use_gate": False,
    "init_lora_weights": "kaiming",
}


TOWERS: dict[str, tuple[type, type, dict[str, int], int]] = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, {"intermediate_size": 32}, 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 32}, 0),
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}, 1),
    "dinov2 with registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "num_register_tokens": 4},
        5,
    ),
    "dinov3": (
        DINOv3ViTModel,
        DINOv3ViTConfig,
        {"intermediate_size": 32, "num_register_tokens": 4},
        5,
    ),
}
"""Name -> model, its config, further keys, and the tokens before the patches."""


def build_tower(name: str, image_size: int = 16) -> Any:
    """Return a tower of three blocks; equal calls return equal weights."""
    torch.manual_seed(0)
    model, config, keys, _ = TOWERS[name]
    return model(config(**(SMALL | keys | {"image_size": image_size})))


def clip() -> Any:
    return build_tower("clip")


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tokens(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    hidden_states: torch.Tensor = model(pixel_values=pixels, output_hidden_states=True)[
        "hidden_states"
    ][-2]
    return hidden_states[:, 1:]


def shake(model: nn.Module, seed: int = 2) -> None:
    """Move every trainable parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
