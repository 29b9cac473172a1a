"""Reorder SAM's tokens as the released code does, for adapters that were trained on that order.

A cache holds the plain map, row by row. The released code reshapes it before the adapter, so that
columns of the image become channels. An adapter of a released checkpoint has learned that order
and gives meaningless tokens on the plain map. Used by ``objective`` with ``sam_layout: released``.

Legend: B batch, N tokens (row-major over the square), S side of the grid, C channels, G = R S.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from movekd.errors import ConfigError


def released_sam_tokens(tokens_BNC: Tensor) -> Tensor:
    """Return SAM's tokens (B, N, C) in the released code's order: the same values, moved.

    C / S must be a square R * R. SAM has S 64, C 256, R 2.

    Raises:
        ConfigError: the grid does not allow it, for example a pooled one.

    Source: MoVE-KD (arXiv 2501.01709), released code: (256, 64, 64) -> reshape (16384, 64) ->
    transpose to (64, 128, 128) -> pixel_unshuffle(2).
    """
    num_tokens, channels = tokens_BNC.shape[1:]
    side = math.isqrt(num_tokens)
    factor = math.isqrt(channels // side)
    if side * side != num_tokens or factor * factor * side != channels:
        raise ConfigError(
            f"the released layout of SAM needs SAM's native map, 4096 tokens of 256 channels; "
            f"found {num_tokens} tokens of {channels}. Take the cache's native grid, or "
            "distill.sam_layout: plain."
        )
    rows = tokens_BNC.transpose(1, 2).reshape(len(tokens_BNC), channels * side, side)
    columns_BSGG = rows.transpose(1, 2).reshape(-1, side, factor * side, factor * side)
    released_BCSS = F.pixel_unshuffle(columns_BSGG, factor)
    return released_BCSS.flatten(2).transpose(1, 2)
