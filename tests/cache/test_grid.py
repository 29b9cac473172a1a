import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.cache.grid import grid_side, resize_attention, resize_matrix, resize_tokens
from movekd.errors import CacheError

sides = st.integers(1, 20)


@given(sides, sides)
def test_shrinking_weighs_by_overlap_of_intervals(a: int, b: int) -> None:
    side_in, side_out = max(a, b), min(a, b)
    expected = np.zeros((side_out, side_in))
    width = side_in / side_out
    for out in range(side_out):
        for cell in range(side_in):
            low, high = max(out * width, cell), min((out + 1) * width, cell + 1)
            expected[out, cell] = max(0.0, high - low) / width
    np.testing.assert_allclose(resize_matrix(side_in, side_out), expected, atol=1e-6)


@given(sides, sides)
def test_rows_sum_to_one_and_a_constant_map_stays(side_in: int, side_out: int) -> None:
    assert torch.allclose(resize_matrix(side_in, side_out).sum(1), torch.ones(side_out))
    constant = torch.full((2, side_in**2, 3), 7.0)
    assert torch.allclose(resize_tokens(constant, side_out), torch.full((2, side_out**2, 3), 7.0))


def test_enlarging_is_bilinear_interpolation() -> None:
    maps = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(maps, size=(14, 14), mode="bilinear")
    found = resize_tokens(maps.flatten(2).mT, 14)
    assert torch.allclose(found, expected.flatten(2).mT, atol=2e-6)


def test_dividing_grids_equal_average_pooling() -> None:
    maps = torch.randn(2, 5, 12, 12)
    expected = torch.nn.functional.avg_pool2d(maps, 2).flatten(2).mT
    assert torch.allclose(resize_tokens(maps.flatten(2).mT, 6), expected, atol=1e-6)


@settings(deadline=None)
@given(sides, sides, st.integers(0, 2**31))
def test_attention_keeps_its_mass(side_in: int, side_out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(2, 3, side_in**2, generator=generator)
    resized = resize_attention(attention, side_out)
    assert resized.shape == (2, 3, side_out**2)
    assert torch.allclose(resized.sum(-1), attention.sum(-1), rtol=1e-4)


def test_tokens_that_form_no_square_are_refused() -> None:
    with pytest.raises(CacheError, match="12 tokens form no square"):
        grid_side(12)
