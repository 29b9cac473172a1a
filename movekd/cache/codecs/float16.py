"""``float16``: tokens as they are, rounded to half precision."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from movekd.cache.codecs.interface import SHIPPED_DECODING, ArrayLayout, Codec
from movekd.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

    from movekd.cache.stats import ChannelStats

_LARGEST = 65504.0


class Float16(Codec):
    """Two bytes per value; relative error of a value at most 2**-11."""

    name = "float16"
    decoding = SHIPPED_DECODING

    def arrays(self, num_tokens: int, width: int) -> tuple[ArrayLayout, ...]:
        """Return one array: tokens (N, D)."""
        return (ArrayLayout("tokens", (num_tokens, width), "float16", ("row", "token", "channel")),)

    def encode(self, tokens_BND: "Tensor", stats: "ChannelStats") -> "dict[str, Tensor]":
        """Return ``{"tokens": float16 (B, N, D)}``. Raises CacheError beyond 65504."""
        if not bool((tokens_BND.abs() <= _LARGEST).all()):
            raise CacheError(
                f"a feature is {tokens_BND.abs().max().item():.3g}, beyond float16's 65504 (or not "
                "a number); use --codec int8, which standardises channels first."
            )
        return {"tokens": tokens_BND.half()}

    def decode_standardised(
        self, stored: "Mapping[str, Tensor]", stats: "ChannelStats"
    ) -> "Tensor":
        """Return ``(tokens - mean) / std``, float32."""
        return stats.standardise(stored["tokens"])

    def decode(self, stored: "Mapping[str, Tensor]", stats: "ChannelStats") -> "Tensor":
        """Return the tokens, float32."""
        return stored["tokens"].float()
