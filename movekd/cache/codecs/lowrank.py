"""``lowrank``: the tokens of one image as a product of two thin matrices of 3 to 6 bits.

    Z  ~  U diag(scale) V^T          Z (N, D) standardised, U (N, k), V (D, k), k the rank

A teacher's neighbouring tokens resemble each other, so a few components hold most of an image's
energy. The first eighth of the components has 6 bits, up to half 4 bits, and the rest 3 bits: a
component needs one bit more only where its energy is four times larger. The codes are nodes of a
binary tree: 1 is its root, the children of node i are 2i and 2i + 1, and a code of b bits is a node
of depth b. The array ``levels`` has the value of every node.

``encode`` takes the leading components, rounds one factor, solves the other one for what the
rounding did, and rounds that; then the same once more. So an error of one factor is partly undone
by the other one.

Source: Eckart, Young (1936) for the truncation; Halko, Martinsson, Tropp (2011), algorithm 4.4, for
the leading components; Lloyd (1982) for levels that lie denser where values are more frequent.

Legend: B batch, N tokens, D channels, K components, M N or D, P bits per token or channel.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from movekd.cache.codecs.interface import ArrayLayout, Codec
from movekd.errors import CacheError, ConfigError, shorten

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from movekd.cache.stats import ChannelStats

LOWRANK = "lowrank"
"""The codec of a spec that leaves the rank to the calibration."""
RANKS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Ranks that the calibration chooses from."""
MAX_RANK = 1024
MAX_BITS = 6
_WIDENINGS = (0.9, 1.3, 1.9, 2.8, 4.0)
"""Scales that the encoder tries, over the root of a component's mean square: heavy tails need wide
ones."""
_POWERS = 3
"""Multiplications by the Gram matrix after the first one."""


class Lowrank(Codec):
    """3.75 bits per component, token and channel; the energy error is the teacher's and the rank's.

    Attributes:
        name: ``lowrank`` and the rank.
        rank: number of components; rows with fewer tokens or channels have as many as those.
    """

    decoding = (
        "channel_mean + channel_std * sum over components of levels[node of the token] * "
        "component_scale * levels[node of the channel]; docs/cache-format.md has the bits of a node"
    )

    def __init__(self, rank: int, name: str | None = None) -> None:
        self.rank, self.name = rank, name or f"{LOWRANK}{rank}"

    def arrays(self, num_tokens: int, width: int) -> tuple[ArrayLayout, ...]:
        """Return tokens (N, P / 8), channel_codes (D, P / 8) and component_scale (K,)."""
        rank = min(self.rank, num_tokens, width)
        size = -(-sum(bit_counts(rank)) // 8)
        return (
            ArrayLayout("tokens", (num_tokens, size), "uint8", ("row", "token", "byte"), 0),
            ArrayLayout("channel_codes", (width, size), "uint8", ("row", "channel", "byte"), 0),
            ArrayLayout("component_scale", (rank,), "float16", ("row", "component")),
        )

    def group_arrays(self, width: int) -> "dict[str, npt.NDArray[np.generic]]":
        """Return levels (128,) float32: the value of every node of the tree."""
        return {"levels": tree_levels()}

    def encode(self, tokens_BND: "Tensor", stats: "ChannelStats") -> "dict[str, Tensor]":
        """Return ``tokens``, ``channel_codes`` (uint8) and ``component_scale`` (float16).

        Raises:
            CacheError: a value is not finite, or a scale does not fit float16.
        """
        import torch

        z_BND, levels = stats.standardise(tokens_BND), stats.codec_arrays["levels"]
        if not bool(torch.isfinite(z_BND).all()):
            raise CacheError(_UNFIT)
        rank = min(self.rank, *z_BND.shape[1:])
        is_wide = z_BND.shape[1] <= z_BND.shape[2]
        z_BSL = z_BND if is_wide else z_BND.mT  # S the shorter side, L the longer one
        short_nodes, _ = _nearest_nodes(leading_components(z_BSL, rank), levels)
        long_nodes, _ = _nearest_nodes(_least_squares(levels[short_nodes], z_BSL), levels)
        short_nodes, _ = _nearest_nodes(_least_squares(levels[long_nodes], z_BSL.mT), levels)
        long_nodes, scale_BK = _nearest_nodes(_least_squares(levels[short_nodes], z_BSL), levels)
        stored_BK = scale_BK.half()
        if not bool(torch.isfinite(stored_BK).all()):
            raise CacheError(_UNFIT)
        token_nodes, channel_nodes = (
            (short_nodes, long_nodes) if is_wide else (long_nodes, short_nodes)
        )
        return {
            "tokens": _pack(token_nodes.mT),
            "channel_codes": _pack(channel_nodes.mT),
            "component_scale": stored_BK,
        }

    def decode_standardised(
        self, stored: "Mapping[str, Tensor]", stats: "ChannelStats"
    ) -> "Tensor":
        """Return ``U diag(scale) V^T``."""
        import torch

        scale_BK = stored["component_scale"].float()
        levels = stats.codec_arrays["levels"].to(scale_BK.device)
        u_BNK, v_BDK = (
            levels[_unpack(stored[name], scale_BK.shape[-1])]
            for name in ("tokens", "channel_codes")
        )
        with torch.autocast(scale_BK.device.type, enabled=False):  # it would multiply in bfloat16
            product: Tensor = (u_BNK * scale_BK[:, None]) @ v_BDK.mT
        return product


_UNFIT = (
    "a standardised feature is beyond what lowrank with float16 scales can hold, or not a number; "
    "check the teacher's weights and the calibration images."
)


def lowrank_codec(name: str) -> Lowrank | None:
    """Return the codec ``lowrank`` or ``lowrank48``; None if the name is of another kind.

    Without a rank it is the codec before its calibration, with the largest rank that this may
    choose.

    Raises:
        ConfigError: the rank is not 1 to 1024.
    """
    found = re.fullmatch(rf"{LOWRANK}([0-9]*)", name)
    if found is None:
        return None
    digits = found[1]
    if digits == "":
        return Lowrank(RANKS[-1], LOWRANK)
    if digits.startswith("0") or len(digits) > 4 or int(digits) > MAX_RANK:
        raise ConfigError(
            f"no codec '{shorten(name)}': the rank must be from 1 to {MAX_RANK}, for example "
            f"{LOWRANK}32."
        )
    return Lowrank(int(digits))


def bit_counts(rank: int) -> tuple[int, ...]:
    """Return how many components have a first bit, how many a second one, and so on."""
    half, eighth = -(-rank // 2), -(-rank // 8)
    return (rank, rank, rank, half, eighth, eighth)


def tree_levels() -> "npt.NDArray[np.float32]":
    """Return the values of the nodes, float32 (128,); the levels of b bits are 2**b to 2**(b+1).

    ``-sign(t) log(1 - |t|)`` at 2**b equally spaced t: nearly the best levels for values with the
    density of Laplace, which factors of convolutional networks have, and 1% of a component's
    energy worse than the best ones for normal values.
    """
    import numpy as np

    nodes = np.arange(2 ** (MAX_BITS + 1))
    width = 2 ** np.floor(np.log2(np.maximum(nodes, 1)))
    t = (2 * (nodes - width) + 1) / width - 1
    t[:2] = 0  # the root has no value
    levels: npt.NDArray[np.float32] = (-np.sign(t) * np.log1p(-np.abs(t))).astype("<f4")
    return levels


def leading_components(z_BSL: "Tensor", rank: int) -> "Tensor":
    """Return the leading left singular vectors (B, K, S), the largest first; S <= L.

    A quarter more vectors than asked start from signs that SHAKE-256 gives and are multiplied by
    the Gram matrix; where they would be half of all, its eigenvectors are computed instead. The
    largest entry of a vector is positive.
    """
    import torch

    gram_BSS = z_BSL @ z_BSL.mT
    size = gram_BSS.shape[-1]
    count = rank + rank // 4 + 8
    if 2 * count >= size:
        vectors_BSK = torch.linalg.eigh(gram_BSS)[1]
    else:
        start_SK = torch.from_numpy(_signs(size, count)).to(gram_BSS)
        basis_BSK = torch.linalg.qr(gram_BSS @ start_SK)[0]
        for _ in range(_POWERS):
            basis_BSK = torch.linalg.qr(gram_BSS @ basis_BSK)[0]
        inner_BKK = basis_BSK.mT @ gram_BSS @ basis_BSK
        vectors_BSK = basis_BSK @ torch.linalg.eigh(inner_BKK)[1]
    leading_BKS = vectors_BSK.mT.flip(1)[:, :rank]
    largest = leading_BKS.gather(-1, leading_BKS.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -leading_BKS, leading_BKS)


def _signs(size: int, count: int) -> "npt.NDArray[np.float32]":
    """Return signs (size, count); no library's random stream could change them."""
    import numpy as np

    stream = hashlib.shake_256(b"movekd lowrank").digest(size * count // 8 + 1)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=size * count)
    return (bits.reshape(size, count) * 2.0 - 1).astype(np.float32)


def _tiers(rank: int) -> list[tuple[int, int, int]]:
    """Return the groups of components with one number of bits: first, end, bits."""
    counts = bit_counts(rank)
    ends = sorted({*counts})
    return [
        (first, end, sum(count >= end for count in counts))
        for first, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _nearest_nodes(factor_BKM: "Tensor", levels: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return nodes (B, K, M) int32 and scales (B, K): ``scale * levels[node]`` is the factor.

    Of several widenings each component takes the one with the least error; its scale is then the
    one of least squares.
    """
    import torch

    nodes, scales = [], []
    for first, end, bits in _tiers(factor_BKM.shape[1]):
        part = factor_BKM[:, first:end]
        of_tier = levels[2**bits : 2 ** (bits + 1)].contiguous()
        borders = (of_tier[1:] + of_tier[:-1]) / 2
        size = part.square().mean(-1, keepdim=True).sqrt() / of_tier.square().mean().sqrt()
        found: list[Tensor] = []
        for widening in _WIDENINGS:
            scaled = (part / (size * widening).clamp(min=1e-30)).contiguous()
            code = torch.bucketize(scaled, borders, out_int32=True)
            value = of_tier[code]
            norm, dot = value.square().sum(-1), (part * value).sum(-1)
            new = [code + 2**bits, dot / norm, dot.square() / norm]
            if found:
                is_better = new[2] > found[2]
                new[0] = torch.where(is_better[..., None], new[0], found[0])
                new[1], new[2] = (
                    torch.where(is_better, n, f) for n, f in zip(new[1:], found[1:], strict=True)
                )
            found = new
        nodes.append(found[0])
        scales.append(found[1])
    return torch.cat(nodes, 1), torch.cat(scales, 1)


def _least_squares(factor_BKM: "Tensor", z_BML: "Tensor") -> "Tensor":
    """Return the X (B, K, L) with the least ``||Z - factor^T X||``."""
    import torch

    gram_BKK = factor_BKM @ factor_BKM.mT
    diagonal = gram_BKK.diagonal(dim1=-2, dim2=-1)  # a view: components may coincide
    diagonal += 1e-5 * diagonal.mean(-1, keepdim=True)
    solution: Tensor = torch.linalg.solve(gram_BKK, factor_BKM @ z_BML)
    return solution


def _pack(nodes_BMK: "Tensor") -> "Tensor":
    """Return the bits of nodes as bytes (B, M, P / 8): first all first bits, the highest ones."""
    import torch

    counts = bit_counts(nodes_BMK.shape[-1])
    depth = torch.zeros(nodes_BMK.shape[-1], dtype=torch.int32, device=nodes_BMK.device)
    for count in counts:
        depth[:count] += 1
    planes = [
        nodes_BMK[..., :count] >> (depth[:count] - 1 - bit) & 1 for bit, count in enumerate(counts)
    ]
    bits = torch.nn.functional.pad(torch.cat(planes, -1), (0, -sum(counts) % 8))
    shifts = torch.arange(7, -1, -1, dtype=torch.int32, device=bits.device)
    packed: Tensor = (bits.view(*bits.shape[:-1], -1, 8) << shifts).sum(-1).to(torch.uint8)
    return packed


def _unpack(packed_BMP: "Tensor", rank: int) -> "Tensor":
    """Return the nodes (B, M, K) int32."""
    import torch

    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed_BMP.device)
    bits = (packed_BMP[..., None] >> shifts & 1).flatten(-2)
    nodes = torch.ones(*bits.shape[:-1], rank, dtype=torch.uint8, device=bits.device)
    start = 0
    for count in bit_counts(rank):
        nodes[..., :count] = 2 * nodes[..., :count] + bits[..., start : start + count]
        start += count
    return nodes.int()
