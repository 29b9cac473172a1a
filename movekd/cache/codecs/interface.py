"""The interface of a codec: its arrays, encode, decode, and the error between the two.

Input: tokens of a teacher on any device, and the channel statistics of the calibration.
Output: the arrays of the teacher's Zarr group, and tokens again.

``cache ls`` and ``cache verify`` ask a codec for its arrays and load no torch. So the files of this
package import torch inside functions only.

Legend: B batch, N tokens, D channels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from movekd.cache.stats import ChannelStats

SHIPPED_DECODING = (
    "float16: tokens. int8: channel_mean + channel_std * token_scale[group of 128 channels] * "
    "tokens"
)
"""``Codec.decoding`` of float16 and int8. Checksums cover it: a change makes new caches differ."""


ERROR_LIMIT = 8.0
"""Sigmas to which ``TokenErrors.limited_*`` limit standardised values before they compare them."""


@dataclass(frozen=True)
class TokenErrors:
    """Sums and maxima over the tokens of a batch, each a float64 scalar on the tokens' device.

    With z a token in standardised channels and z' the same decoded, ``sum`` and ``max`` are of
    ``||z' - z|| / ||z||``. One value of a thousand sigma hides in it that a codec lost all other
    channels. ``limited_sum`` and ``limited_max`` are the same, of z and z' limited to
    +-``ERROR_LIMIT``.
    """

    sum: "Tensor"
    max: "Tensor"
    limited_sum: "Tensor"
    limited_max: "Tensor"
    squared_error: "Tensor"
    """Sum of ``||z' - z||**2``; over ``squared_norm`` it is the energy error."""
    squared_norm: "Tensor"
    """Sum of ``||z||**2``."""


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a teacher's group. A row of the array is one chunk."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    """A name that numpy, torch and Zarr share: ``int8``, ``uint8``, ``float16``, ``float32`` ..."""
    dimension_names: tuple[str, ...]
    fill_value: float | int = float("nan")
    """The value of rows that were never written. Integer arrays give their own."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        bits = int("".join(filter(str.isdigit, self.dtype)))  # `--help` loads no numpy
        return math.prod(self.row_shape) * bits // 8


class Codec(ABC):
    """How tokens are stored. Rows have one fixed size, which depends on the shapes only."""

    name: str
    """The value of ``CacheSpec.codec`` and ``--codec``."""
    decoding: ClassVar[str]
    """The formula in the group's attributes, for readers without movekd."""
    rotates: ClassVar[bool] = False
    """Whether ``rotate`` changes anything."""

    @abstractmethod
    def arrays(self, num_tokens: int, width: int) -> tuple[ArrayLayout, ...]:
        """Return the arrays of ``num_tokens`` tokens of ``width`` channels.

        The first array is called ``tokens``. Fill values must decode to NaN, because a row without
        features must not look like one with features.
        """

    def group_arrays(self, width: int) -> "dict[str, npt.NDArray[np.generic]]":
        """Return what decoding needs beside the rows, such as levels and signs: name -> array.

        The calibration writes them once into the teacher's group and seals them. ``encode`` and
        ``decode`` get them back from there as ``stats.codec_arrays``, so that a cache decodes the
        same for ever. Names, shapes and dtypes depend on the width only. Default: none.
        """
        return {}

    @abstractmethod
    def encode(self, tokens_BND: "Tensor", stats: "ChannelStats") -> "dict[str, Tensor]":
        """Return the values of ``arrays`` for a batch, on the device of the tokens.

        Raises:
            CacheError: a value is not finite, or is beyond the codec's range.
        """

    @abstractmethod
    def decode_standardised(
        self, stored: "Mapping[str, Tensor]", stats: "ChannelStats"
    ) -> "Tensor":
        """Return standardised tokens (B, N, D) float32, on the device of the stored arrays.

        The result is a new tensor: ``decode`` writes over it.
        """

    def rotate(self, standardised: "Tensor", stats: "ChannelStats") -> "Tensor":
        """Return standardised channels (..., D) in the codec's rotation. Default: as they are.

        A rotation changes no squared error, so a loss may compare rotated values.
        """
        return standardised

    def decode_rotated(self, stored: "Mapping[str, Tensor]", stats: "ChannelStats") -> "Tensor":
        """Return ``rotate`` of the standardised tokens, float32 (B, N, D), a new tensor.

        A codec that stores rotated channels saves the way back. Default: it stores none.
        """
        return self.decode_standardised(stored, stats)

    def decode(self, stored: "Mapping[str, Tensor]", stats: "ChannelStats") -> "Tensor":
        """Return tokens (B, N, D) float32 in the teacher's units."""
        return stats.restore_(self.decode_standardised(stored, stats))

    def error(
        self, exact_BND: "Tensor", stored: "Mapping[str, Tensor]", stats: "ChannelStats"
    ) -> TokenErrors:
        """Return the errors ``||decoded - exact|| / ||exact||`` of all tokens.

        Both norms are taken in standardised channels, so that a channel of large values hides
        no error in the other channels.
        """
        exact = stats.standardise(exact_BND)
        decoded = self.decode_standardised(stored, stats)
        difference_BN, norm_BN = (decoded - exact).norm(dim=-1), exact.norm(dim=-1)
        error_BN = _relative(difference_BN, norm_BN)
        decoded.clamp_(-ERROR_LIMIT, ERROR_LIMIT)
        exact.clamp_(-ERROR_LIMIT, ERROR_LIMIT)
        limited_BN = _relative((decoded - exact).norm(dim=-1), exact.norm(dim=-1))
        return TokenErrors(
            error_BN.sum(),
            error_BN.max(),
            limited_BN.sum(),
            limited_BN.max(),
            difference_BN.double().square().sum(),
            norm_BN.double().square().sum(),
        )


def _relative(difference_BN: "Tensor", norm_BN: "Tensor") -> "Tensor":
    error_BN: Tensor = difference_BN / norm_BN.clamp(min=1e-30)
    return error_BN.masked_fill_(~(norm_BN > 0), 0.0).double()
