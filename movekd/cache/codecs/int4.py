"""``int4``: standardised channels in 4 bits, with one float16 scale per token and 32 channels.

    x  ~  mean + std * scale * q          q in -8..7

The scale has a sign, so that the largest value of a group stands at -8, whatever its own sign is:
16 steps are used instead of 15. An outlier costs its own group only.

Legend: B batch, N tokens, D channels, G groups of channels.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from movekd.cache.codecs.channel_groups import in_groups, scale_groups_
from movekd.cache.codecs.interface import ArrayLayout, Codec
from movekd.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

    from movekd.cache.stats import ChannelStats

GROUP_CHANNELS = 32
"""Channels that share one scale. The last group may be smaller."""


class Int4(Codec):
    """0.28 of float16; relative error of a token 8% (normal values) to 11% (Student-t of 4)."""

    name = "int4"
    decoding = (
        "int4: channel_mean + channel_std * token_scale[group of 32 channels] * q, with q the "
        "signed low 4 bits of tokens (first half of the channels) and then the signed high 4 bits"
    )

    def arrays(self, num_tokens: int, width: int) -> tuple[ArrayLayout, ...]:
        """Return tokens (N, D / 2) and token_scale (N, G). An unwritten row has scale NaN."""
        packed, groups = -(-width // 2), -(-width // GROUP_CHANNELS)
        return (
            ArrayLayout("tokens", (num_tokens, packed), "int8", ("row", "token", "byte"), 0),
            ArrayLayout("token_scale", (num_tokens, groups), "float16", ("row", "token", "group")),
        )

    def encode(self, tokens_BND: "Tensor", stats: "ChannelStats") -> "dict[str, Tensor]":
        """Return ``{"tokens": int8 (B, N, D / 2), "token_scale": float16 (B, N, G)}``.

        The codes are those of the scale that the largest value asks for. The scale that is stored
        is then the best one for these codes (least squares), which keeps 2% of the error away.

        Raises:
            CacheError: a value is not finite, or its scale does not fit float16.
        """
        import torch

        width = tokens_BND.shape[-1]
        grouped = in_groups(stats.standardise(tokens_BND), GROUP_CHANNELS)
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        scale = (largest / -8).half().float()
        if not bool(torch.isfinite(scale).all()):
            raise CacheError(
                "a standardised feature is beyond what int4 with float16 scales can hold, or not a "
                "number; check the teacher's weights and the calibration images."
            )
        codes = (grouped / torch.where(scale != 0, scale, 1)).round_().clamp_(-8, 7)
        scale_BNG = ((grouped * codes).sum(-1) / codes.square().sum(-1).clamp(min=1)).half()
        low, high = _halves(codes.to(torch.int8).flatten(-2)[..., :width])
        return {"tokens": (low & 15) | (high << 4), "token_scale": scale_BNG}

    def decode_standardised(
        self, stored: "Mapping[str, Tensor]", stats: "ChannelStats"
    ) -> "Tensor":
        """Return ``scale * q``. Shifts are arithmetic: they keep the sign of a code."""
        import torch

        packed, scale_BNG = stored["tokens"], stored["token_scale"].float()
        width = len(stats.mean_D)
        codes = torch.cat([packed << 4, packed], -1).bitwise_right_shift_(4)[..., :width]
        return scale_groups_(codes.float(), scale_BNG, GROUP_CHANNELS)


def _halves(codes_BND: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the first and the second half of the channels; an odd width ends with a zero."""
    import torch

    if codes_BND.shape[-1] % 2:
        codes_BND = torch.nn.functional.pad(codes_BND, (0, 1))
    low, high = codes_BND.chunk(2, -1)
    return low, high
