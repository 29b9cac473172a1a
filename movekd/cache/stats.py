"""What encodes and decodes a teacher's features: channel statistics, and the codec's arrays.

The calibration settles them before the first Zarr shard. Codecs standardise channels with them.

Legend: B batch, N tokens, D channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache.codecs import Codec
from movekd.errors import CacheError


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation of each channel, float32 (D,), as the calibration sealed them.

    With a floor, no deviation is below its share of the median deviation. A constant channel has
    the floor, and std 1 without one.

    Attributes:
        mean_D: means.
        std_D: deviations.
        codec_arrays: the codec's own arrays, see ``Codec.group_arrays``.
    """

    mean_D: Tensor
    std_D: Tensor
    codec_arrays: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_numpy(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> "ChannelStats":
        """Return statistics that share the memory of a group's arrays without rows."""
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return cls(tensors.pop("channel_mean"), tensors.pop("channel_std"), tensors)

    def for_codec(self, codec: Codec) -> "ChannelStats":
        """Return the same statistics with the arrays that a new group of this codec gets."""
        arrays = codec.group_arrays(len(self.mean_D))
        device = self.mean_D.device
        tensors = {name: torch.from_numpy(a).to(device) for name, a in sorted(arrays.items())}
        return replace(self, codec_arrays=tensors)

    def group_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return all arrays as they stand in the group, as ``layout.group_arrays`` orders them."""
        tensors = {"channel_mean": self.mean_D, "channel_std": self.std_D, **self.codec_arrays}
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}

    def to(self, device: torch.device) -> "ChannelStats":
        """Return the same statistics on ``device``."""
        arrays = {name: array.to(device) for name, array in self.codec_arrays.items()}
        return ChannelStats(self.mean_D.to(device), self.std_D.to(device), arrays)

    def standardise(self, tokens_BND: Tensor) -> Tensor:
        """Return ``(tokens - mean) / std`` in float32."""
        return (tokens_BND.float() - self.mean_D) / self.std_D

    def restore_(self, standardised_BND: Tensor) -> Tensor:
        """Return ``mean + std * standardised``, written over the argument."""
        return torch.addcmul(self.mean_D, standardised_BND, self.std_D, out=standardised_BND)


class StatsAccumulator:
    """Channel statistics over many batches, in float64. No batch is kept.

    Source: Chan, Golub, LeVeque (1979), the merge of two sets' means and squared deviations.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, tokens_BND: Tensor) -> None:
        """Add every token of a batch."""
        values = tokens_BND.flatten(0, 1).double().cpu()
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        total = self._count + count
        delta = mean - self._mean
        self._squares = self._squares + squares + delta.square() * (self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def result(self, std_floor: float = 0.0) -> ChannelStats:
        """Return the statistics of everything added.

        A channel that was nearly silent has a tiny deviation, and where it fires later, its
        standardised value is hundreds of sigma: a few values then are most of a squared loss, and
        of int8's scale. A floor keeps such a channel at a size that its values can have.

        Args:
            std_floor: smallest deviation, as a share of the median deviation of the channels that
                vary. 0: no floor.

        Raises:
            CacheError: nothing was added, or a feature was not finite.
        """
        if not self._count:
            raise CacheError("no image of the calibration could be read; check the corpus.")
        std = (self._squares / self._count).sqrt()
        if not bool(torch.isfinite(std).all()):
            raise CacheError(
                "the teacher gave features that are not finite numbers during the calibration; "
                "check its weights, or use --dtype float32."
            )
        is_constant = std <= 1e-6 * self._mean.abs().clamp(min=1e-12)
        if std_floor > 0 and not bool(is_constant.all()):
            floor = std_floor * std[~is_constant].median()
            std = torch.where(is_constant, floor, std.clamp(min=floor))
        else:
            std = torch.where(is_constant, 1.0, std)
        return ChannelStats(self._mean.float(), std.float())
