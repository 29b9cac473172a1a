import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.cache.codecs import codec, codec_names
from movekd.cache.stats import ChannelStats, StatsAccumulator
from movekd.cache.targets import TeacherTargets
from movekd.errors import CacheError


def heavy_tailed(seed: int, width: int, num_tokens: int = 9) -> torch.Tensor:
    """Tokens (4, N, D) with channels as unequal as those of real encoders."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, num_tokens, width, generator=generator)
    chi = torch.randn(6, 4, num_tokens, width, generator=generator).square().mean(0).sqrt()
    mean = torch.randn(width, generator=generator) * 3
    std = torch.rand(width, generator=generator) * 4 + 0.1
    return normal / chi * std + mean


def statistics(tokens: torch.Tensor) -> ChannelStats:
    accumulator = StatsAccumulator()
    accumulator.add(tokens)
    return accumulator.result()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 128, 200, 256]))
def test_int8_error_of_a_value_is_at_most_half_a_step(seed: int, width: int) -> None:
    tokens = heavy_tailed(seed, width)
    stats = statistics(tokens)
    stored = codec("int8").encode(tokens, stats)
    groups = -(-width // 128)
    assert stored["tokens"].dtype == torch.int8
    assert stored["token_scale"].shape == (4, 9, groups)
    step = stored["token_scale"].float().repeat_interleave(128, -1)[..., :width]
    difference = (
        codec("int8").decode_standardised(stored, stats) - stats.standardise(tokens)
    ).abs()
    # half a step, and at the largest value of a group what rounding its scale to float16 took
    assert (difference <= step * (0.5 + 127 * 2**-11) + 1e-6).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_reported_error_is_the_error(seed: int) -> None:
    tokens = heavy_tailed(seed, 160)
    for name in codec_names():
        stats = statistics(tokens).for_codec(codec(name))
        stored = codec(name).encode(tokens, stats)
        errors = []
        for image, restored in zip(tokens, codec(name).decode(stored, stats), strict=True):
            for exact, token in zip(image, restored, strict=True):
                z, z_hat = (
                    (exact - stats.mean_D) / stats.std_D,
                    (token - stats.mean_D) / stats.std_D,
                )
                errors.append(((z_hat - z).norm() / z.norm()).item())
        reported = codec(name).error(tokens, stored, stats)
        mean = sum(errors) / len(errors)
        assert reported.sum.item() / len(errors) == pytest.approx(mean, rel=1e-2)
        assert reported.max.item() == pytest.approx(max(errors), rel=1e-2)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1, 128, 200]), st.sampled_from(codec_names()))
def test_both_ways_of_decoding_agree(seed: int, width: int, name: str) -> None:
    tokens = heavy_tailed(seed, width)
    stats = statistics(tokens).for_codec(codec(name))
    targets = TeacherTargets(codec(name).encode(tokens, stats), stats, codec(name))
    restored = stats.restore_(targets.standardised_BND)
    torch.testing.assert_close(restored, targets.tokens_BND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("width", [1, 128, 200])
def test_a_batch_has_the_arrays_that_the_codec_names(name: str, width: int) -> None:
    """And unwritten rows, which hold fill values, decode to NaN."""
    tokens = heavy_tailed(0, width)
    stats = statistics(tokens).for_codec(codec(name))
    stored = codec(name).encode(tokens, stats)
    arrays = codec(name).arrays(9, width)
    assert {n: (tuple(a.shape), a.dtype) for n, a in stored.items()} == {
        a.name: ((4, *a.row_shape), getattr(torch, a.dtype)) for a in arrays
    }
    assert [a.row_bytes for a in arrays] == [stored[a.name][0].nbytes for a in arrays]
    unwritten = {
        n: torch.full_like(stored[n], a.fill_value) for n, a in zip(stored, arrays, strict=True)
    }
    assert codec(name).decode(unwritten, stats).isnan().all()


def test_int8_error_stays_below_one_percent() -> None:
    tokens = heavy_tailed(0, 1024, num_tokens=64)
    stats = statistics(tokens)
    errors = codec("int8").error(tokens, codec("int8").encode(tokens, stats), stats)
    assert errors.sum.item() / (4 * 64) < 0.010
    assert errors.max.item() < 0.02


def test_an_outlier_hides_in_the_relative_error_and_not_in_the_limited_one() -> None:
    """One channel of 1,000 sigma sets the scale of 128 channels: the others become 0."""
    normal_BND = torch.randn(2, 9, 128, generator=torch.manual_seed(0))
    stats = ChannelStats(torch.zeros(128), torch.ones(128))
    for outlier, relative, limited in ((2.0, (0.003, 0.01), (0.003, 0.01)),
                                       (1_000.0, (0.005, 0.02), (0.6, 1.0))):  # fmt: skip
        tokens_BND = normal_BND.clone()
        tokens_BND[..., 5] = outlier
        found = codec("int8").error(tokens_BND, codec("int8").encode(tokens_BND, stats), stats)
        assert relative[0] < found.sum.item() / 18 < relative[1]
        assert limited[0] < found.limited_sum.item() / 18 < limited[1]
        assert found.limited_sum.item() / 18 <= found.limited_max.item() < limited[1]


def test_float16_rounds_a_value_by_half_a_unit_in_the_last_place() -> None:
    tokens = heavy_tailed(0, 1024, num_tokens=64)
    stats = statistics(tokens)
    difference = (
        codec("float16").decode(codec("float16").encode(tokens, stats), stats) - tokens
    ).abs()
    assert (difference <= tokens.abs() * 2**-11 + 2**-25).all()


def test_dead_channel_and_all_zero_token_survive() -> None:
    tokens = heavy_tailed(1, 130)
    tokens[..., 5] = 3.25
    stats = statistics(tokens)
    assert stats.std_D[5] == 1
    tokens[0, 0] = stats.mean_D
    restored = codec("int8").decode(codec("int8").encode(tokens, stats), stats)
    assert torch.allclose(restored[..., 5], torch.tensor(3.25))
    assert torch.allclose(restored[0, 0], stats.mean_D)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7e4])
def test_float16_refuses_what_it_cannot_hold(bad: float) -> None:
    tokens = torch.ones(1, 2, 3)
    stats = statistics(torch.randn(4, 2, 3))
    tokens[0, 1, 2] = bad
    with pytest.raises(CacheError, match="65504"):
        codec("float16").encode(tokens, stats)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_refuses_what_is_not_a_number(bad: float) -> None:
    tokens = torch.ones(1, 2, 3)
    tokens[0, 1, 2] = bad
    with pytest.raises(CacheError, match="int8"):
        codec("int8").encode(tokens, statistics(torch.randn(4, 2, 3)))
