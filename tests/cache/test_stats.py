import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.cache.stats import StatsAccumulator
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
