import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heavy_tails import heavy_tokens, is_sparse
from movekd.cache.stats import ChannelStats, StatsAccumulator
from movekd.errors import CacheError


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


def statistics(tokens_BND: torch.Tensor, std_floor: float = 0.0) -> ChannelStats:
    accumulator = StatsAccumulator()
    accumulator.add(tokens_BND)
    return accumulator.result(std_floor)


def test_a_floor_bounds_what_rare_channels_become() -> None:
    calibration, later = heavy_tokens(64), heavy_tokens(400, seed=1)
    plain, floored = statistics(calibration), statistics(calibration, 0.25)
    floor = 0.25 * plain.std_D.median()
    assert torch.equal(floored.std_D, plain.std_D.clamp(min=floor))
    assert torch.equal(floored.mean_D, plain.mean_D)
    assert plain.standardise(later).abs().max() > 1_000
    assert floored.standardise(later).abs().max() <= later.abs().max() / floor * 1.01
    dense = ~is_sparse()
    assert torch.equal(floored.std_D[dense], plain.std_D[dense])


def test_a_constant_channel_has_the_floor_in_every_unit() -> None:
    tokens_BND = heavy_tokens(8)
    tokens_BND[..., 1] = 3.0
    for unit in (1.0, 2.0**10):
        found = statistics(unit * tokens_BND, 0.25)
        assert found.std_D[1] == found.std_D.min() < unit * 0.1
    assert statistics(tokens_BND).std_D[1] == 1
    assert torch.equal(statistics(torch.ones(2, 3, 4), 0.25).std_D, torch.ones(4))
