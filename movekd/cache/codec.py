"""How tokens become bytes and tokens again: ``float16`` or ``int8``.

``int8`` standardises each channel with the statistics of the sealed calibration, then keeps one
float16 scale for each token and group of 128 channels::

    x  ~  mean + std * scale * q          q in -127..127

Comes in: a teacher's tokens, on any device. Goes out: the arrays of one batch under their names
in the Zarr group, for the writer; and back, from stored arrays on any device, for the losses.

Legend: B batch, N tokens, D channels, G groups of channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache.layout import GROUP_CHANNELS
from movekd.cache.spec import Codec
from movekd.errors import CacheError

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation of each channel, float32 (D,). A dead channel has std 1."""

    mean_D: Tensor
    std_D: Tensor

    @classmethod
    def from_numpy(
        cls, mean_D: npt.NDArray[np.float32], std_D: npt.NDArray[np.float32]
    ) -> "ChannelStats":
        """Return statistics that share the arrays' memory."""
        return cls(torch.from_numpy(mean_D), torch.from_numpy(std_D))

    def to(self, device: torch.device) -> "ChannelStats":
        """Return the same statistics on ``device``."""
        return ChannelStats(self.mean_D.to(device), self.std_D.to(device))

    def standardise(self, tokens_BND: Tensor) -> Tensor:
        """Return ``(tokens - mean) / std`` in float32."""
        return (tokens_BND.float() - self.mean_D) / self.std_D


class StatsAccumulator:
    """Channel statistics over many batches, in float64, without keeping a batch.

    Source: Chan, Golub, LeVeque (1979), the merge of two sets' means and squared deviations.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, tokens_BND: Tensor) -> None:
        """Take in every token of a batch."""
        values = tokens_BND.flatten(0, 1).double().cpu()
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        if self._mean is None or self._squares is None:
            self._count, self._mean, self._squares = count, mean, squares
            return
        total = self._count + count
        delta = mean - self._mean
        self._squares = self._squares + squares + delta.square() * (self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def result(self) -> ChannelStats:
        """Return the statistics of everything added.

        Raises:
            CacheError: nothing was added, or a feature was not finite.
        """
        if self._mean is None or self._squares is None:
            raise CacheError("no image of the calibration could be read; check the corpus.")
        std = (self._squares / self._count).sqrt()
        if not bool(torch.isfinite(std).all()):
            raise CacheError(
                "the teacher gave features that are not finite numbers during the calibration; "
                "check its weights, or use --dtype float32."
            )
        dead = std <= 1e-6 * self._mean.abs().clamp(min=1e-12)
        return ChannelStats(self._mean.float(), torch.where(dead, 1.0, std).float())


def encode(tokens_BND: Tensor, codec: Codec, stats: ChannelStats) -> dict[str, Tensor]:
    """Return the stored arrays of a batch of tokens, on the device of the tokens.

    float16: {"tokens": float16 (B, N, D)}.
    int8: {"tokens": int8 (B, N, D), "token_scale": float16 (B, N, G)}.

    Raises:
        CacheError: a value is not finite, or does not fit the codec's range.
    """
    if codec == "float16":
        if not bool((tokens_BND.abs() <= _FLOAT16_MAX).all()):
            raise CacheError(
                f"a feature is {tokens_BND.abs().max().item():.3g}, beyond float16's 65504 (or not "
                "a number); use --codec int8, which standardises channels first."
            )
        return {"tokens": tokens_BND.half()}
    standardised = _grouped(stats.standardise(tokens_BND))
    scale_BNG = (standardised.abs().amax(-1) / 127).half()
    if not bool(torch.isfinite(scale_BNG).all()):
        raise CacheError(
            "a standardised feature is beyond what int8 with float16 scales can hold, or not a "
            "number; check the teacher's weights and the calibration images."
        )
    divisor = torch.where(scale_BNG > 0, scale_BNG, 1).float()[..., None]
    codes = (standardised / divisor).round().clamp(-127, 127).to(torch.int8)
    return {"tokens": codes.flatten(-2)[..., : tokens_BND.shape[-1]], "token_scale": scale_BNG}


def decode_standardised(stored: Mapping[str, Tensor], stats: ChannelStats) -> Tensor:
    """Return standardised tokens (B, N, D) float32 from stored arrays, on their device.

    For int8 this is ``scale * q``: what the revised loss compares with, without a detour
    through the teacher's own units.
    """
    tokens = stored["tokens"]
    if "token_scale" not in stored:
        return stats.standardise(tokens)
    scale_BNG = stored["token_scale"].float()
    values_BND = tokens.float()
    whole = tokens.shape[-1] // GROUP_CHANNELS  # groups without a rest are scaled in one go
    end = whole * GROUP_CHANNELS
    grouped = values_BND[..., :end].view(*tokens.shape[:-1], whole, GROUP_CHANNELS)
    grouped.mul_(scale_BNG[..., :whole, None])
    values_BND[..., end:].mul_(scale_BNG[..., whole:])
    return values_BND


def decode(stored: Mapping[str, Tensor], stats: ChannelStats) -> Tensor:
    """Return tokens (B, N, D) float32 in the teacher's units from stored arrays."""
    if "token_scale" not in stored:
        return stored["tokens"].float()
    tokens_BND = decode_standardised(stored, stats)
    return torch.addcmul(stats.mean_D, tokens_BND, stats.std_D, out=tokens_BND)


def decode_numpy(
    stored: Mapping[str, npt.NDArray[Any]], mean_D: npt.NDArray[Any], std_D: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Return what ``decode`` returns, from numpy arrays and without torch's types."""
    tokens = stored["tokens"].astype(np.float32)
    if "token_scale" not in stored:
        return tokens
    scale_BNG = stored["token_scale"].astype(np.float32)
    scale_BND = np.repeat(scale_BNG, GROUP_CHANNELS, axis=-1)[..., : tokens.shape[-1]]
    return np.asarray(tokens * scale_BND * std_D + mean_D, np.float32)


def token_error(
    exact_BND: Tensor, stored: Mapping[str, Tensor], stats: ChannelStats
) -> tuple[Tensor, Tensor]:
    """Return (sum, maximum) over a batch of ``||decoded - exact|| / ||exact||``, a token each.

    Both norms are taken in standardised channels, so that a loud channel hides nothing.
    """
    exact = stats.standardise(exact_BND)
    difference = (decode_standardised(stored, stats) - exact).norm(dim=-1)
    norm = exact.norm(dim=-1)
    error_BN = torch.where(norm > 0, difference / norm.clamp(min=1e-30), 0.0)
    return error_BN.double().sum(), error_BN.double().max()


def _grouped(values_BND: Tensor) -> Tensor:
    """Return (B, N, G, 128), the last group filled up with zeros."""
    missing = -values_BND.shape[-1] % GROUP_CHANNELS
    padded = torch.nn.functional.pad(values_BND, (0, missing))
    return padded.reshape(*values_BND.shape[:-1], -1, GROUP_CHANNELS)
