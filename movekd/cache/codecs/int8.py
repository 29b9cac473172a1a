"""``int8``: standardised channels, with one float16 scale per token and group of 128 channels.

    x  ~  mean + std * scale * q          q in -127..127

Legend: B batch, N tokens, D channels, G groups of channels.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from movekd.cache.codecs.channel_groups import in_groups, scale_groups_
from movekd.cache.codecs.interface import SHIPPED_DECODING, ArrayLayout, Codec
from movekd.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

    from movekd.cache.stats import ChannelStats

GROUP_CHANNELS = 128
"""Channels that share one scale. The last group may be smaller."""


class Int8(Codec):
    """About one byte per value; relative error of a token 0.5 to 0.9%."""

    name = "int8"
    decoding = SHIPPED_DECODING

    def arrays(self, num_tokens: int, width: int) -> tuple[ArrayLayout, ...]:
        """Return tokens (N, D) and token_scale (N, G). An unwritten row has scale NaN."""
        groups = -(-width // GROUP_CHANNELS)
        return (
            ArrayLayout("tokens", (num_tokens, width), "int8", ("row", "token", "channel"), 0),
            ArrayLayout("token_scale", (num_tokens, groups), "float16", ("row", "token", "group")),
        )

    def encode(self, tokens_BND: "Tensor", stats: "ChannelStats") -> "dict[str, Tensor]":
        """Return ``{"tokens": int8 (B, N, D), "token_scale": float16 (B, N, G)}``.

        Raises:
            CacheError: a value is not finite, or its scale does not fit float16.
        """
        import torch

        width = tokens_BND.shape[-1]
        grouped = in_groups(stats.standardise(tokens_BND), GROUP_CHANNELS)
        scale_BNG = (grouped.abs().amax(-1) / 127).half()
        if not bool(torch.isfinite(scale_BNG).all()):
            raise CacheError(
                "a standardised feature is beyond what int8 with float16 scales can hold, or not a "
                "number; check the teacher's weights and the calibration images."
            )
        divisor = torch.where(scale_BNG > 0, scale_BNG, 1).float()[..., None]
        codes = (grouped / divisor).round().clamp(-127, 127).to(torch.int8)
        return {"tokens": codes.flatten(-2)[..., :width], "token_scale": scale_BNG}

    def decode_standardised(
        self, stored: "Mapping[str, Tensor]", stats: "ChannelStats"
    ) -> "Tensor":
        """Return ``scale * q``: what the revised loss compares with."""
        scale_BNG = stored["token_scale"].float()
        return scale_groups_(stored["tokens"].float(), scale_BNG, GROUP_CHANNELS)
