"""The order in which the released code hands SAM's map on, for adapters that were trained on it.

A cache holds the plain map, row by row. The released code reshapes it on the way to the adapter
so that columns of the image become channels; an adapter of a released checkpoint has learned that
order and means nothing on the plain map. Used by the training on native-grid targets.

Legend: B batch, N tokens (row-major over the square), S side of the grid, C channels, G = R S.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from movekd.errors import ConfigError


def released_sam_tokens(tokens_BNC: Tensor) -> Tensor:
    """Return SAM's tokens (B, N, C) in the released code's order: the same values, elsewhere.

    Any grid that it can be done on: C / S a square R * R. SAM's own is S 64, C 256, R 2.

    Raises:
        ConfigError: another grid, a pooled one for one.

    Source: MoVE-KD (arXiv 2501.01709), released code: (256, 64, 64) -> reshape (16384, 64) ->
    transpose to (64, 128, 128) -> pixel_unshuffle(2).
    """
    num_tokens, channels = tokens_BNC.shape[1:]
    side = math.isqrt(num_tokens)
    factor = math.isqrt(channels // side)
    if side * side != num_tokens or factor * factor * side != channels:
        raise ConfigError(
            f"the released layout of SAM is defined on its own map, 4096 tokens of 256 channels; "
            f"found {num_tokens} tokens of {channels}. Take the cache's native grid, or "
            "distill.sam_layout: plain."
        )
    rows = tokens_BNC.transpose(1, 2).reshape(len(tokens_BNC), channels * side, side)
    columns_BSGG = rows.transpose(1, 2).reshape(-1, side, factor * side, factor * side)
    released_BCSS = F.pixel_unshuffle(columns_BSGG, factor)
    return released_BCSS.flatten(2).transpose(1, 2)
