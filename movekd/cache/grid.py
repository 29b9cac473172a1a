"""Resize a square grid of tokens by exact area.

A teacher's 64x64 map becomes the student's 24x24: each new cell is the average over the area that
it covers, fractions of old cells included. The build resizes before encoding; the training resizes
caches that keep the native grid.

Legend: B batch, N tokens (row-major over the square), D channels, H heads, S side of the grid.
"""

from functools import lru_cache

import torch
from torch import Tensor

from movekd.cache.layout import grid_side


@lru_cache(maxsize=32)
def resize_matrix(side_in: int, side_out: int) -> Tensor:
    """Return the (side_out, side_in) float32 matrix that resizes one axis; rows sum to 1.

    Shrinking weights each input cell by its overlap with the output cell. Enlarging interpolates
    linearly between cell centres, clamped at the border.
    """
    scale = side_in / side_out
    cells = torch.arange(side_in, dtype=torch.float64)
    low = torch.arange(side_out, dtype=torch.float64)[:, None] * scale
    if side_out <= side_in:
        high = low + scale
        overlap = torch.minimum(high, cells + 1) - torch.maximum(low, cells)
        weights = overlap.clamp(min=0)
    else:
        centre = (low + scale / 2 - 0.5).clamp(0, side_in - 1)
        weights = (1 - (centre - cells).abs()).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def resize_tokens(tokens_BND: Tensor, side_out: int) -> Tensor:
    """Return tokens (B, side_out**2, D): the area average of a square grid (B, N, D)."""
    side_in = grid_side(tokens_BND.shape[1])
    if side_in == side_out:
        return tokens_BND
    weights = resize_matrix(side_in, side_out).to(tokens_BND)
    tokens_BSSD = tokens_BND.reshape(len(tokens_BND), side_in, side_in, -1)
    return torch.einsum("yi,xj,bijd->byxd", weights, weights, tokens_BSSD).flatten(1, 2)


def resize_attention(attention_BHN: Tensor, side_out: int) -> Tensor:
    """Return attention (B, H, side_out**2) with the sum of (B, H, N): cells are added by area."""
    side_in = grid_side(attention_BHN.shape[-1])
    if side_in == side_out:
        return attention_BHN
    weights = resize_matrix(side_in, side_out).to(attention_BHN)
    attention_BHSS = attention_BHN.reshape(*attention_BHN.shape[:-1], side_in, side_in)
    resized = torch.einsum("yi,xj,bhij->bhyx", weights, weights, attention_BHSS).flatten(-2)
    mass, before = resized.sum(-1, keepdim=True), attention_BHN.sum(-1, keepdim=True)
    return resized * torch.where(mass > 0, before / mass, 0.0)
