import pytest
import torch

from movekd.cache.codecs.bit_planes import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("width", [1, 2, 12, 20, 144])
def test_codes_come_back_from_the_fewest_bytes(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (2, 3, width), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, packed_bytes(width, bits))
    assert width * bits / 8 <= packed_bytes(width, bits) < width * bits / 8 + 2
    assert torch.equal(unpack(packed, width, bits), codes)


def test_a_plane_holds_the_parts_of_a_row_from_its_lowest_bits_up() -> None:
    codes = torch.arange(16, dtype=torch.uint8) % 16
    assert pack(codes, 4).tolist() == [k + 16 * (k + 8) for k in range(8)]
    quarters = torch.tensor([3, 2, 1, 0, 1, 1, 1, 1], dtype=torch.uint8)
    assert pack(quarters, 2).tolist() == [3 + 4 * 1 + 16 * 1 + 64 * 1, 2 + 4 * 0 + 16 * 1 + 64 * 1]
