import pytest
import torch

from movekd.cache.codecs import codec
from movekd.errors import CacheError
from student_t import plain, student_t

INT4 = codec("int4")


@pytest.mark.parametrize("width", [1, 3, 31, 33, 96, 200, 1024])
def test_a_value_is_within_half_a_step(width: int) -> None:
    """Of the step before the fit, which moves it by at most one 24th; 7.5 steps are cut to 7."""
    tokens = student_t(2, 9, width)
    stored = INT4.encode(tokens, plain(width))
    assert stored["tokens"].shape == (2, 9, -(-width // 2))
    step = stored["token_scale"].float().abs().repeat_interleave(32, -1)[..., :width]
    difference = (INT4.decode_standardised(stored, plain(width)) - tokens).abs()
    assert (difference <= step * 1.15 + 1e-6).all()
    assert (difference <= step * 0.75 + 1e-6).float().mean() > 0.97


def test_errors_and_size() -> None:
    for tokens, most in ((student_t(2, 500, 1024), 0.115), (torch.randn(2, 500, 1024), 0.088)):
        stored = INT4.encode(tokens, plain(1024))
        errors = INT4.error(tokens, stored, plain(1024))
        assert 0.5 * most < errors.sum.item() / 1000 < most
    size = sum(array.row_bytes for array in INT4.arrays(576, 1024))
    assert size / (576 * 1024 * 2) <= 0.29


def test_both_signs_of_the_largest_value_use_all_sixteen_codes() -> None:
    ramp = torch.arange(-8.0, 8).repeat(2)[None, None]
    for tokens in (ramp, -ramp):
        stored = INT4.encode(tokens, plain(32))
        assert torch.equal(INT4.decode_standardised(stored, plain(32)), tokens)


def test_an_outlier_costs_its_own_group_only() -> None:
    tokens = torch.randn(2, 50, 1024, generator=torch.manual_seed(0))
    loud = tokens.clone()
    loud[..., 40] = 1000.0
    decoded, expected = (
        INT4.decode_standardised(INT4.encode(some, plain(1024)), plain(1024))
        for some in (loud, tokens)
    )
    assert decoded[..., 40].allclose(torch.tensor(1000.0), rtol=1e-3)
    others = [channel for channel in range(1024) if not 32 <= channel < 64]
    assert torch.equal(decoded[..., others], expected[..., others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_what_is_no_number_is_refused(bad: float) -> None:
    tokens = torch.ones(1, 2, 3)
    tokens[0, 1, 2] = bad
    with pytest.raises(CacheError, match="int4"):
        INT4.encode(tokens, plain(3))


def test_zeros_stay_zeros() -> None:
    stored = INT4.encode(torch.zeros(1, 2, 40), plain(40))
    assert torch.equal(INT4.decode_standardised(stored, plain(40)), torch.zeros(1, 2, 40))
