"""Pack codes of 1 to 4 bits into bytes, so that unpacking is a few shifts of whole arrays.

A plane of b bits holds 8 / b codes per byte: the first part of the channels in the lowest bits, the
next part above it. 4 bits are the two halves of a row, 2 bits its quarters. 3 bits are a plane of 2
and then a plane of 1. An incomplete last part ends with zeros.

Legend: D channels.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,)}
"""Bits of a code -> bits of its planes, the lowest bits first."""


def packed_bytes(width: int, bits: int) -> int:
    """Return the bytes of a row of ``width`` codes."""
    return sum(-(-width * plane // 8) for plane in PLANES[bits])


def pack(codes: "Tensor", bits: int) -> "Tensor":
    """Return codes, uint8 (..., D), as bytes (..., ``packed_bytes``)."""
    import torch

    planes, low = [], 0
    for plane in PLANES[bits]:
        parts = 8 // plane
        values = (codes >> low) & (2**plane - 1)
        values = torch.nn.functional.pad(values, (0, -values.shape[-1] % parts))
        packed = torch.zeros_like(values[..., : values.shape[-1] // parts])
        for number, part in enumerate(values.chunk(parts, -1)):
            packed |= part << plane * number
        planes.append(packed)
        low += plane
    return torch.cat(planes, -1)


def unpack(packed: "Tensor", width: int, bits: int) -> "Tensor":
    """Return the codes, uint8 (..., D)."""
    import torch

    codes: Tensor | None = None
    start, low = 0, 0
    for plane in PLANES[bits]:
        parts = 8 // plane
        length = -(-width // parts)
        block = packed[..., start : start + length]
        values = torch.empty(
            *block.shape[:-1], parts * length, dtype=torch.uint8, device=block.device
        )
        for number in range(parts):
            part = values[..., number * length : (number + 1) * length]
            torch.bitwise_right_shift(block, plane * number, out=part)
        values = values.bitwise_and_(2**plane - 1)[..., :width]
        codes = values if codes is None else codes | (values << low)
        start, low = start + length, low + plane
    assert codes is not None
    return codes
