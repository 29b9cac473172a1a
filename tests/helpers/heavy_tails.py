"""A teacher with sparse, heavy-tailed channels, like those of real convolutional networks.

Of EfficientNet-Lite0's channels some are silent on nearly all tokens: their standard deviation over
a calibration is .0001, beside a median of .21. When such a channel fires, its standardised value is
hundreds of sigma.

``heavy_tokens`` makes such tokens from nothing but a seed. ``spec`` is a teacher that makes them
from pixels (``provider: python``): equal images have equal features, in every batch. Its dense
channels are a linear map of the patches, so a student can learn them.

Legend: B batch, N tokens, D channels, H W pixels.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from movekd.cache.spec import CacheSpec

WIDTH = 144
"""Channels: two of int8's groups, the second one smaller."""
EVERY = 8
"""Channels 0, 8, 16 ... are sparse, the others dense."""
RATE = 1 / 2_000
"""Share of tokens at which a sparse channel fires."""
DENSE, QUIET, LOUD = 0.2, 1e-4, 0.5
"""Sizes of a dense channel, of a silent sparse one, and of one that fires (times Student-t 3)."""


def is_sparse(width: int = WIDTH) -> Tensor:
    """Return which channels are sparse, bool (D,)."""
    return torch.arange(width) % EVERY == 0


def heavy_tokens(
    num_images: int, num_tokens: int = 16, width: int = WIDTH, *, seed: int = 0, rate: float = RATE
) -> Tensor:
    """Return tokens (B, N, D) float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, num_tokens, width)
    dense_BND = DENSE * torch.randn(shape, generator=generator)
    return torch.where(is_sparse(width), _sparse(shape, rate, generator), dense_BND)


def _sparse(shape: tuple[int, ...], rate: float, generator: torch.Generator) -> Tensor:
    """Return values that are nearly zero, but at ``rate`` of the places Student-t of 3 degrees."""
    fires = torch.rand(shape, generator=generator) < rate
    normal, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    square = torch.randn((3, *shape), generator=generator).square().mean(0)
    return torch.where(fires, LOUD * normal / square.sqrt(), QUIET * noise)


class HeavyTails(nn.Module):
    """Patches times a random matrix; the sparse channels are drawn from a hash of the image."""

    def __init__(self, width: int = WIDTH, patch_size: int = 4, rate: float = RATE) -> None:
        super().__init__()
        self.rate = rate
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        nn.init.normal_(self.embed.weight, std=DENSE / (3 * patch_size**2) ** 0.5)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return tokens (B, N, D)."""
        dense_BND = self.embed(pixels_BCHW).flatten(2).transpose(1, 2)
        if pixels_BCHW.is_meta:
            return dense_BND
        sparse = []
        for pixels_CHW in pixels_BCHW:
            digest = hashlib.sha256(pixels_CHW.float().cpu().numpy().tobytes()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            sparse.append(_sparse(tuple(dense_BND.shape[1:]), self.rate, generator))
        sparse_BND = torch.stack(sparse).to(dense_BND)
        return torch.where(
            is_sparse(dense_BND.shape[-1]).to(dense_BND.device), sparse_BND, dense_BND
        )


def encoder(**model_args: Any) -> HeavyTails:
    """Return the network; ``spec`` names this function."""
    return HeavyTails(**model_args)


def spec(**changes: Any) -> CacheSpec:
    """Return the spec of the teacher: 4 x 4 tokens of images of 16 pixels, in int8.

    ``model_args`` are those of ``HeavyTails``.
    """
    content: dict[str, Any] = {
        "name": "heavy",
        "provider": "python",
        "factory": "heavy_tails:encoder",
        "weights": "random",
        "image_size": 16,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "layer": "last",
        "codec": "int8",
    }
    return CacheSpec.model_validate(content | changes)
