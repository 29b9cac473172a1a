"""Tokens of heavy-tailed channels, and channel statistics that change nothing."""

import torch
from torch import Tensor

from movekd.cache.stats import ChannelStats


def student_t(*shape: int, seed: int = 0) -> Tensor:
    """Values of Student's t with 4 degrees of freedom, divided by their deviation."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    chi = torch.randn(4, *shape, generator=generator).square().mean(0).sqrt()
    return normal / chi / 2**0.5


def plain(width: int) -> ChannelStats:
    """Statistics of mean 0 and deviation 1."""
    return ChannelStats(torch.zeros(width), torch.ones(width))
