import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.cache.codec import (
    ChannelStats,
    StatsAccumulator,
    decode,
    decode_standardised,
    encode,
    token_error,
)
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
    stored = encode(tokens, "int8", stats)
    groups = -(-width // 128)
    assert stored["tokens"].dtype == torch.int8
    assert stored["token_scale"].shape == (4, 9, groups)
    step = stored["token_scale"].float().repeat_interleave(128, -1)[..., :width]
    difference = (decode_standardised(stored, stats) - stats.standardise(tokens)).abs()
    # half a step, and at the largest value of a group what rounding its scale to float16 took
    assert (difference <= step * (0.5 + 127 * 2**-11) + 1e-6).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_reported_error_is_the_error(seed: int) -> None:
    tokens = heavy_tailed(seed, 160)
    stats = statistics(tokens)
    for name in ("float16", "int8"):
        stored = encode(tokens, name, stats)
        errors = []
        for image, restored in zip(tokens, decode(stored, stats), strict=True):
            for exact, token in zip(image, restored, strict=True):
                z, z_hat = (
                    (exact - stats.mean_D) / stats.std_D,
                    (token - stats.mean_D) / stats.std_D,
                )
                errors.append(((z_hat - z).norm() / z.norm()).item())
        total, worst = token_error(tokens, stored, stats)
        assert total.item() / len(errors) == pytest.approx(sum(errors) / len(errors), rel=1e-2)
        assert worst.item() == pytest.approx(max(errors), rel=1e-2)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([1, 128, 200]), st.sampled_from(["int8", "float16"]))
def test_numpy_decodes_as_torch_does(seed: int, width: int, codec: str) -> None:
    tokens = heavy_tailed(seed, width)
    stats = statistics(tokens)
    targets = TeacherTargets(encode(tokens, codec, stats), stats)
    torch.testing.assert_close(
        torch.from_numpy(targets.numpy()), targets.tokens_BND, rtol=1e-6, atol=1e-6
    )


def test_int8_error_stays_below_one_percent() -> None:
    tokens = heavy_tailed(0, 1024, num_tokens=64)
    stats = statistics(tokens)
    total, worst = token_error(tokens, encode(tokens, "int8", stats), stats)
    assert total.item() / (4 * 64) < 0.010
    assert worst.item() < 0.02


def test_float16_rounds_a_value_by_half_a_unit_in_the_last_place() -> None:
    tokens = heavy_tailed(0, 1024, num_tokens=64)
    stats = statistics(tokens)
    difference = (decode(encode(tokens, "float16", stats), stats) - tokens).abs()
    assert (difference <= tokens.abs() * 2**-11 + 2**-25).all()


def test_dead_channel_and_all_zero_token_survive() -> None:
    tokens = heavy_tailed(1, 130)
    tokens[..., 5] = 3.25
    stats = statistics(tokens)
    assert stats.std_D[5] == 1
    tokens[0, 0] = stats.mean_D
    restored = decode(encode(tokens, "int8", stats), stats)
    assert torch.allclose(restored[..., 5], torch.tensor(3.25))
    assert torch.allclose(restored[0, 0], stats.mean_D)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7e4])
def test_float16_refuses_what_it_cannot_hold(bad: float) -> None:
    tokens = torch.ones(1, 2, 3)
    stats = statistics(torch.randn(4, 2, 3))
    tokens[0, 1, 2] = bad
    with pytest.raises(CacheError, match="65504"):
        encode(tokens, "float16", stats)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_refuses_what_is_not_a_number(bad: float) -> None:
    tokens = torch.ones(1, 2, 3)
    tokens[0, 1, 2] = bad
    with pytest.raises(CacheError, match="int8"):
        encode(tokens, "int8", statistics(torch.randn(4, 2, 3)))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_statistics_do_not_depend_on_the_batches(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(sizes), 4, 6, generator=generator) * 5 + 1000
    accumulator = StatsAccumulator()
    for part in tokens.split(sizes):
        accumulator.add(part)
    stats = accumulator.result()
    flat = tokens.flatten(0, 1).double()
    assert torch.allclose(stats.mean_D, flat.mean(0).float())
    assert torch.allclose(stats.std_D, flat.std(0, unbiased=False).float(), rtol=1e-5)


def test_statistics_refuse_features_that_are_not_finite() -> None:
    accumulator = StatsAccumulator()
    accumulator.add(torch.full((1, 2, 3), float("nan")))
    with pytest.raises(CacheError, match="not finite"):
        accumulator.result()
    with pytest.raises(CacheError, match="no image of the calibration"):
        StatsAccumulator().result()
