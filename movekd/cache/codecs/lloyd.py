"""``lloyd4``, ``lloyd3``, ``lloyd2``: a rotation, then 4, 3 or 2 bits per value.

    y  =  H (signs * x) / sqrt(D)          x: a token in standardised channels
    y  ~  scale * levels[code]

A rotated token is a sum of many channels in each of its values, so these are nearly normal whatever
the channels are. The levels are those of Lloyd and Max for a normal distribution: the error is the
same for every encoder. One scale per token.

One channel of a thousand sigma would drown the others, because the rotation spreads it over all of
them. So a token whose largest value holds much of its energy keeps that value outside: it is taken
out before the rotation and stored as a float16 number with its place.

H is the Kronecker product of two small Hadamard matrices, so with m n = D and x as a matrix (m, n):
``y = left (signs * x) right' / sqrt(D)``. The matrices, signs and levels are arrays of the group.
Decoding reads them from there, so a cache does not depend on this file.

Sources: Max (1960), Lloyd (1982) for the levels; Suresh et al., arXiv 1611.00429, for the rotation.

Legend: B batch, N tokens, D channels.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from movekd.cache.codecs.bit_planes import pack, packed_bytes, unpack
from movekd.cache.codecs.hadamard import factor_orders, hadamard_factors
from movekd.cache.codecs.interface import ArrayLayout, Codec
from movekd.errors import CacheError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from movekd.cache.stats import ChannelStats

POSITIVE_LEVELS = {
    2: (0.4527800346, 1.5104176085),
    3: (0.2450941789, 0.7560052812, 1.3439092785, 2.1519457045),
    4: (0.1283950299, 0.3880482995, 0.6567591185, 0.9423404565,
        1.2562311973, 1.618046386, 2.0690172265, 2.732589571),
}  # fmt: skip
"""Lloyd-Max levels above 0 of a standard normal distribution, by bits; the others mirror them."""
OUTLIER_ENERGY = 1 / 8
"""A token's largest value is stored outside if its square exceeds this share of the others' sum."""


class Lloyd(Codec):
    """Base of the three codecs. Widths without a Hadamard matrix are refused, see ``hadamard``."""

    bits: ClassVar[int]
    rotates = True
    decoding = (
        "lloyd: channel_mean + channel_std * x. y = token_scale[0] * levels[codes], with the codes "
        "in 4-bit, 2-bit or 2-bit and 1-bit planes; x = rotation_signs * (rotation_left' Y "
        "rotation_right) / sqrt(channels), with Y the matrix of y; to x is added "
        "token_scale[1], at row token_scale[2] and column token_scale[3] of such a matrix"
    )

    def arrays(self, num_tokens: int, width: int) -> tuple[ArrayLayout, ...]:
        """Return tokens (N, bytes) and token_scale (N, 4). An unwritten row has scale NaN.

        The four are the scale, the outlier (0: none), and the outlier's row and column in the token
        as a matrix (m, n).

        Raises:
            CacheError: the width has no Hadamard matrix.
        """
        factor_orders(width)
        packed = packed_bytes(width, self.bits)
        return (
            ArrayLayout("tokens", (num_tokens, packed), "uint8", ("row", "token", "byte"), 0),
            ArrayLayout("token_scale", (num_tokens, 4), "float16", ("row", "token", "scale")),
        )

    def group_arrays(self, width: int) -> "dict[str, npt.NDArray[np.generic]]":
        """Return levels, float32 (2**bits,), and of the rotation both matrices and the signs, int8.

        The signs are the bits of SHA-256 digests: no library promises its random numbers for ever.
        """
        import numpy as np

        positive = np.array(POSITIVE_LEVELS[self.bits])
        left, right = hadamard_factors(width)
        digests = [
            hashlib.sha256(f"movekd rotation signs {block}".encode()).digest()
            for block in range(-(-width // 256))
        ]
        bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8))[:width]
        return {
            "levels": np.concatenate([-positive[::-1], positive]).astype("<f4"),
            "rotation_left": left,
            "rotation_right": right,
            "rotation_signs": 1 - 2 * bits.astype(np.int8),
        }

    def encode(self, tokens_BND: "Tensor", stats: "ChannelStats") -> "dict[str, Tensor]":
        """Return ``{"tokens": uint8 (B, N, bytes), "token_scale": float16 (B, N, 4)}``.

        The codes are those of the root mean square. The scale that is stored is then the best one
        for these codes (least squares).

        Raises:
            CacheError: a value is not finite, or is beyond float16.
        """
        import torch

        x_BND = stats.standardise(tokens_BND)
        place_BN1 = x_BND.abs().argmax(-1, keepdim=True)
        largest_BN1 = x_BND.gather(-1, place_BN1)
        rest_BN1 = x_BND.scatter(-1, place_BN1, 0.0).square().sum(-1, keepdim=True)
        is_outlier = largest_BN1.square() > OUTLIER_ENERGY * rest_BN1
        outlier_BN1 = torch.where(is_outlier, largest_BN1, 0.0).half()
        x_BND.scatter_(-1, place_BN1, largest_BN1 - outlier_BN1.float())

        y_BND, levels = self.rotate(x_BND, stats), stats.codec_arrays["levels"]
        scale_BN1 = y_BND.square().mean(-1, keepdim=True).sqrt().half().float()
        y_over_scale = y_BND / torch.where(scale_BN1 > 0, scale_BN1, 1)
        codes = torch.zeros(y_BND.shape, dtype=torch.uint8, device=y_BND.device)
        for between in ((levels[1:] + levels[:-1]) / 2).tolist():  # twice as fast as bucketize
            codes += y_over_scale > between
        values_BND = _look_up(codes, levels)
        best_BN1 = (y_BND * values_BND).sum(-1, keepdim=True)
        best_BN1 /= values_BND.square().sum(-1, keepdim=True)

        columns = len(stats.codec_arrays["rotation_right"])
        place_BN1 *= is_outlier
        at = [place_BN1 // columns, place_BN1 % columns]
        token_scale = torch.cat([best_BN1.half(), outlier_BN1, *(part.half() for part in at)], -1)
        if not bool(torch.isfinite(token_scale).all()):
            raise CacheError(
                f"a standardised feature is beyond what {self.name} with float16 scales can hold, "
                "or not a number; check the teacher's weights and the calibration images."
            )
        return {"tokens": pack(codes, self.bits), "token_scale": token_scale}

    def rotate(self, standardised: "Tensor", stats: "ChannelStats") -> "Tensor":
        """Return ``H (signs * x) / sqrt(D)`` of (..., D), float32."""
        left, right, signs = _rotation(stats)
        return _transform(standardised.float() * signs, left, right)

    def decode_standardised(
        self, stored: "Mapping[str, Tensor]", stats: "ChannelStats"
    ) -> "Tensor":
        """Return the standardised tokens, rotated back."""
        left, right, signs = _rotation(stats)
        x_BND = _transform(self._decode_codes(stored, stats), left.T, right.T).mul_(signs)
        outlier_BN, row_BN, column_BN = _outliers(stored, stats)
        place_BN = row_BN * len(right) + column_BN
        return x_BND.scatter_add_(-1, place_BN[..., None], outlier_BN[..., None])

    def decode_rotated(self, stored: "Mapping[str, Tensor]", stats: "ChannelStats") -> "Tensor":
        """Return the tokens as ``rotate`` makes them: a table and a scale, no rotation."""
        left, right, signs = _rotation(stats)
        y_BND = self._decode_codes(stored, stats)
        outlier, row, column = (part.flatten() for part in _outliers(stored, stats))
        at = (outlier.abs() > 0).nonzero()[:, 0]
        if len(at):  # of few tokens, of most teachers none
            row, column = row[at], column[at]
            amount = outlier[at] * signs[row * len(right) + column] * len(signs) ** -0.5
            matrix = (left.T[row] * amount[:, None])[:, :, None] * right.T[column][:, None, :]
            y_BND.flatten(0, 1).index_add_(0, at, matrix.flatten(1))
        return y_BND

    def _decode_codes(self, stored: "Mapping[str, Tensor]", stats: "ChannelStats") -> "Tensor":
        """Return ``scale * levels[codes]``, float32 (B, N, D)."""
        codes = unpack(stored["tokens"], len(stats.mean_D), self.bits)
        y_BND = _look_up(codes, stats.codec_arrays["levels"])
        return y_BND.mul_(stored["token_scale"][..., :1].float())


class Lloyd4(Lloyd):
    """0.25 of float16; relative error of a token 9.7%."""

    name = "lloyd4"
    bits = 4


class Lloyd3(Lloyd):
    """0.19 of float16; relative error of a token 19%."""

    name = "lloyd3"
    bits = 3


class Lloyd2(Lloyd):
    """0.13 of float16; relative error of a token 34%."""

    name = "lloyd2"
    bits = 2


def _rotation(stats: "ChannelStats") -> "tuple[Tensor, Tensor, Tensor]":
    """Return left (m, m), right (n, n) and signs (D,), float32."""
    names = ("rotation_left", "rotation_right", "rotation_signs")
    left, right, signs = (stats.codec_arrays[name].float() for name in names)
    return left, right, signs


def _transform(x: "Tensor", left: "Tensor", right: "Tensor") -> "Tensor":
    """Return ``left X right' / sqrt(D)`` for each token as a matrix X, float32 (..., D)."""
    import torch

    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would cost what 4 bits keep
        matrix = x.reshape(*x.shape[:-1], len(left), len(right))
        rotated: Tensor = left * x.shape[-1] ** -0.5 @ (matrix @ right.T)
        return rotated.flatten(-2)


def _outliers(
    stored: "Mapping[str, Tensor]", stats: "ChannelStats"
) -> "tuple[Tensor, Tensor, Tensor]":
    """Return the outlier of each token, float32 (B, N), and its row and column, int64.

    A file may say anything, so the place is kept inside of the token.
    """
    _, outlier_BN, *place = stored["token_scale"].float().unbind(-1)
    sides = [len(stats.codec_arrays[name]) for name in ("rotation_left", "rotation_right")]
    row, column = (
        part.nan_to_num(0).clamp(0, side - 1).long()
        for part, side in zip(place, sides, strict=True)
    )
    return outlier_BN, row, column


def _look_up(codes: "Tensor", levels: "Tensor") -> "Tensor":
    """Return ``levels[codes]``, two codes at a time: four times as fast as indexing.

    Two neighbouring bytes are an index into a table of pairs of levels; codes are below 16.
    """
    import torch

    pairs = levels.new_zeros(len(levels), 256, 2)
    pairs[:, : len(levels), 0] = levels
    pairs[..., 1] = levels[:, None]
    index = codes.contiguous().view(torch.int16).flatten().int()
    found = pairs.view(torch.int64).flatten().index_select(0, index)
    return found.view(torch.float32).view(codes.shape)
