"""Run Pix2Struct's encoder: patches as in its image processor, tokens as in MoVE-KD.

The network's input is flattened patches of 16x16 pixels, each with its row and column. Input: a
square image in 0..1. Output: 45x45 tokens from the blocks, or 32x32 from the end of the network.
``teachers.from_transformers`` uses it.

Legend: B batch, C colours, H W pixels, P side of a patch, R = 45 rows and columns of patches,
G = 32 rows and columns of tokens, N = R x R, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError

MODEL_TYPE = "pix2struct_vision_model"

KEY_MAPPING = {r"^encoder\.(?=(embeddings|encoder|layernorm)\.)": ""}
"""Key of the whole model -> key of the encoder; transformers does not strip this prefix."""

MAX_PATCHES = 2048
"""Limit per image of the published processor and of MoVE-KD's release."""

PATCH_GRID = math.isqrt(MAX_PATCHES)
"""Side of the largest square of patches: 45, whatever the size of the image."""

TOKEN_GRID = 32
"""Side of the grid that MoVE-KD's adapter expects."""


def check_input(spec: CacheSpec) -> None:
    """Refuse normalised pixels, which cannot be turned back into 8-bit levels.

    Raises:
        ConfigError: the spec's mean and std are not 0 and 1.
    """
    if (spec.mean, spec.std) != ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):
        raise ConfigError(
            f"'{spec.name}' has mean {list(spec.mean)} and std {list(spec.std)}; Pix2Struct "
            "standardises every image by its own mean and deviation. Set mean: [0, 0, 0] and "
            "std: [1, 1, 1]."
        )


def patches_of(pixels_BCHW: Tensor, patch_size: int) -> Tensor:
    """Return flattened patches (B, N, 2 + P * P * C), float32: row, column, then levels.

    Args:
        pixels_BCHW: squares in 0..1; rounding recovers the 8-bit levels even from bfloat16.
        patch_size: P.

    The image is standardised by its own mean and deviation, then resized to R x P pixels.

    Source: transformers image_processing_pix2struct.py (normalize, extract_flattened_patches),
    without its padding to ``max_patches``, which the model masks.
    """
    levels_BCHW = (pixels_BCHW.float() * 255).round()
    mean_B = levels_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    least = levels_BCHW[0].numel() ** -0.5
    deviation_B = levels_BCHW.std(dim=(1, 2, 3), keepdim=True).clamp(min=least)
    standardised_BCHW = (levels_BCHW - mean_B) / deviation_B
    resized_BCHW = functional.interpolate(
        standardised_BCHW, size=2 * (PATCH_GRID * patch_size,), mode="bilinear", antialias=True
    )
    batch, colours = resized_BCHW.shape[:2]
    split = resized_BCHW.view(batch, colours, PATCH_GRID, patch_size, PATCH_GRID, patch_size)
    flat_BNX = split.permute(0, 2, 4, 3, 5, 1).reshape(batch, PATCH_GRID**2, -1)
    ids_R = torch.arange(1, PATCH_GRID + 1, dtype=torch.float32, device=pixels_BCHW.device)
    ids_N2 = torch.cartesian_prod(ids_R, ids_R)  # from 1: row 0 marks padding
    return torch.cat((ids_N2.expand(batch, -1, -1), flat_BNX), dim=-1)


def run_pix2struct(module: Any, pixels_BCHW: Tensor) -> Tensor:
    """Return the encoder's output as a map (B, D, G, G).

    Source: hey-cjj/MoVE-KD, the Pix2Struct encoder: the first 2,025 tokens as a 45x45 map,
    resized bilinearly with aligned corners.
    """
    patch_size = math.isqrt(module.config.patch_embed_hidden_size // pixels_BCHW.shape[1])
    patches_BNX = patches_of(pixels_BCHW, patch_size).to(pixels_BCHW.dtype)
    # The model's forward would mask padding. These patches have none, and no mask is faster.
    hidden_BND = module.encoder(module.embeddings(patches_BNX)).last_hidden_state
    tokens_BND: Tensor = module.layernorm(hidden_BND)
    map_BDRR = tokens_BND.transpose(1, 2).reshape(len(tokens_BND), -1, PATCH_GRID, PATCH_GRID)
    return functional.interpolate(
        map_BDRR, size=2 * (TOKEN_GRID,), mode="bilinear", align_corners=True
    )
