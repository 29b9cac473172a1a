"""What several tests of teachers start from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from movekd.cache.spec import CacheSpec

Shrink = Callable[..., CacheSpec]
NORMALISED: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def images(spec: CacheSpec, batch: int = 2) -> Tensor:
    """Return a batch of a teacher's input, always the same."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, spec.image_size, spec.image_size, generator=generator)
