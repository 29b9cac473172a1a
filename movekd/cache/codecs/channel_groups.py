"""Groups of neighbouring channels that share one scale, as int8 and int4 have them.

Legend: B batch, N tokens, D channels, G groups; the last group may be smaller.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def in_groups(values_BND: "Tensor", size: int) -> "Tensor":
    """Return the values as (B, N, G, size); zeros fill the last group."""
    import torch

    padded = torch.nn.functional.pad(values_BND, (0, -values_BND.shape[-1] % size))
    return padded.reshape(*values_BND.shape[:-1], -1, size)


def scale_groups_(values_BND: "Tensor", scale_BNG: "Tensor", size: int) -> "Tensor":
    """Multiply each group by its scale, in place, and return the values."""
    whole = values_BND.shape[-1] // size  # full groups are scaled in one operation
    end = whole * size
    grouped = values_BND[..., :end].view(*values_BND.shape[:-1], whole, size)
    grouped.mul_(scale_BNG[..., :whole, None])
    values_BND[..., end:].mul_(scale_BNG[..., whole:])
    return values_BND
