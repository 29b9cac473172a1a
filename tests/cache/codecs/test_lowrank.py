"""lowrank: the error is that of the truncated SVD, and a bounded part for the few bits."""

import numpy as np
import pytest
import torch

from heavy_tails import heavy_tokens
from movekd.cache.codecs import codec, register_codec
from movekd.cache.codecs.float16 import Float16
from movekd.cache.codecs.lowrank import (
    RANKS,
    Lowrank,
    bit_counts,
    leading_components,
    lowrank_codec,
    tree_levels,
)
from movekd.cache.stats import ChannelStats, StatsAccumulator
from movekd.errors import CacheError, ConfigError


def smooth_tokens(num_tokens: int, width: int, *, decay: float = 1.2) -> torch.Tensor:
    """Return tokens (3, N, D) whose k-th singular value is k ** -decay."""
    generator = torch.Generator().manual_seed(num_tokens + width)
    shortest = min(num_tokens, width)
    u, v = (
        torch.linalg.qr(torch.randn(3, side, shortest, generator=generator))[0]
        for side in (num_tokens, width)
    )
    values = (torch.arange(shortest) + 1.0) ** -decay
    return (u * values) @ v.mT * (num_tokens * width) ** 0.5


def plain_stats(width: int) -> ChannelStats:
    return ChannelStats(torch.zeros(width), torch.ones(width)).for_codec(Lowrank(1))


def energy_error(name: str, tokens: torch.Tensor, stats: ChannelStats) -> float:
    errors = codec(name).error(tokens, codec(name).encode(tokens, stats), stats)
    return (errors.squared_error / errors.squared_norm).item()


@pytest.mark.parametrize(("num_tokens", "width"), [(64, 150), (150, 64)])
def test_the_error_is_that_of_the_truncated_svd_and_a_bounded_part(num_tokens, width) -> None:
    tokens, stats = smooth_tokens(num_tokens, width), plain_stats(width)
    values = np.linalg.svd(tokens.numpy().astype(np.float64), compute_uv=False)
    total, last = (values**2).sum(), 1.0
    for rank in (1, 4, 8, 16, 32, 64):
        best = (values[:, rank:] ** 2).sum() / total  # Eckart and Young: no rank is better
        found = energy_error(f"lowrank{rank}", tokens, stats)
        assert best <= found <= best + 0.012 * (1 - best)
        assert found < last
        last = found
    assert last < 0.001


@pytest.mark.parametrize("size", [64, 150])
def test_leading_components_are_the_singular_vectors(size) -> None:
    """By eigenvectors of the whole Gram matrix where it is small, and by powers of it."""
    tokens = smooth_tokens(size, 200, decay=0.7)
    found = leading_components(tokens, 20).double().numpy()
    exact = np.linalg.svd(tokens.double().numpy())[0][..., :20].swapaxes(1, 2)
    np.testing.assert_allclose(
        found @ found.swapaxes(1, 2), np.eye(20)[None].repeat(3, 0), atol=1e-5
    )
    assert np.abs((found * exact).sum(-1)).min() > 0.99
    # What the vectors leave out is what the best ones leave out, but for a thousandth of it.
    energy = tokens.double().square().sum().item()
    left = [energy - np.square(u @ tokens.double().numpy()).sum() for u in (exact, found)]
    assert left[1] < 1.001 * left[0]
    largest = np.take_along_axis(found, np.abs(found).argmax(-1)[..., None], -1)
    assert (largest > 0).all()


def test_equal_tokens_have_equal_bytes() -> None:
    tokens, stats = smooth_tokens(100, 64), plain_stats(64)
    whole = Lowrank(16).encode(tokens, stats)
    again = Lowrank(16).encode(tokens.clone(), stats)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("rank", "num_tokens", "width"), [(5, 9, 20), (16, 16, 40), (64, 25, 7)])
def test_rows_have_the_size_of_their_shapes(rank, num_tokens, width) -> None:
    """A rank above the shorter side is cut to it."""
    tokens = torch.randn(2, num_tokens, width, generator=torch.manual_seed(0))
    stored = Lowrank(rank).encode(tokens, plain_stats(width))
    kept = min(rank, num_tokens, width)
    size = -(-sum(bit_counts(kept)) // 8)
    assert {name: tuple(array.shape[1:]) for name, array in stored.items()} == {
        "tokens": (num_tokens, size),
        "channel_codes": (width, size),
        "component_scale": (kept,),
    }
    larger = Lowrank(1024).encode(tokens, plain_stats(width))
    assert larger["component_scale"].shape[1] == min(num_tokens, width)


def test_a_row_of_clip_is_small() -> None:
    size = sum(array.row_bytes for array in Lowrank(32).arrays(576, 1024))
    assert size / (2 * 576 * 1024) < 0.021


def test_levels_are_a_tree_in_ascending_order() -> None:
    levels = tree_levels()
    assert (levels.shape, levels.dtype) == ((128,), np.float32)
    for bits in range(1, 7):
        of_bits = levels[2**bits : 2 ** (bits + 1)]
        assert (np.diff(of_bits) > 0).all()
        np.testing.assert_allclose(of_bits, -of_bits[::-1])
    # Two children lie on both sides of their parent.
    for node in range(2, 64):
        assert levels[2 * node] < levels[node] < levels[2 * node + 1]


def test_the_sealed_levels_decode_and_not_the_formula() -> None:
    tokens, stats = smooth_tokens(36, 24), plain_stats(24)
    stored = Lowrank(8).encode(tokens, stats)
    decoded = Lowrank(8).decode_standardised(stored, stats)
    stats.codec_arrays["levels"].mul_(2)
    torch.testing.assert_close(Lowrank(8).decode_standardised(stored, stats), 4 * decoded)


def test_mixed_precision_decodes_the_same() -> None:
    """A training step decodes its targets inside of autocast."""
    tokens, stats = smooth_tokens(36, 24), plain_stats(24)
    stored = Lowrank(8).encode(tokens, stats)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = Lowrank(8).decode_standardised(stored, stats)
    assert torch.equal(decoded, Lowrank(8).decode_standardised(stored, stats))


def test_images_without_variety_survive() -> None:
    """All tokens equal, all zero, and one token that is not: fewer components than the rank."""
    tokens = torch.zeros(3, 25, 40)
    tokens[0] = torch.randn(40, generator=torch.manual_seed(0))
    tokens[2, 3] = 5.0
    stats = plain_stats(40)
    decoded = Lowrank(16).decode_standardised(Lowrank(16).encode(tokens, stats), stats)
    error = (decoded - tokens).square().sum((1, 2)) / tokens.square().sum((1, 2)).clamp(min=1e-9)
    assert (error < 0.005).all()


def test_a_value_of_a_thousand_sigma_leaves_the_other_tokens() -> None:
    """It takes one component; what rounding its factors adds to the others stays bounded."""
    calm, stats = smooth_tokens(64, 150), plain_stats(150)
    spiked = calm.clone()
    spiked[:, 5, 7] += 1_000
    limited = {}
    others = torch.arange(64) != 5
    for name, tokens in (("calm", calm), ("spiked", spiked)):
        decoded = Lowrank(32).decode_standardised(Lowrank(32).encode(tokens, stats), stats)
        error = (decoded - tokens)[:, others].clamp(-8, 8).square().sum()
        limited[name] = (error / calm[:, others].square().sum()).item()
    assert 0.003 < limited["calm"] < 0.006
    assert limited["spiked"] < 0.025


def test_channels_that_rarely_fire_take_no_bits_from_the_others() -> None:
    tokens = heavy_tokens(40, 64, 256)
    accumulator = StatsAccumulator()
    accumulator.add(tokens)
    stats = accumulator.result().for_codec(Lowrank(1))  # without a floor: hundreds of sigma
    stored = Lowrank(64).encode(tokens, stats)
    errors = Lowrank(64).error(tokens, stored, stats)
    assert stats.standardise(tokens).abs().max() > 50
    assert errors.limited_sum.item() / (40 * 64) < 0.15


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_what_does_not_fit_is_refused(bad) -> None:
    tokens = torch.ones(1, 9, 8)
    tokens[0, 1, 2] = bad
    with pytest.raises(CacheError, match=r"beyond what lowrank .* can hold"):
        Lowrank(4).encode(tokens, plain_stats(8))


def test_a_name_says_the_rank() -> None:
    for rank in (1, 48, 1024):
        named = codec(f"lowrank{rank}")
        assert isinstance(named, Lowrank)
        assert (named.name, named.rank) == (f"lowrank{rank}", rank)
    open_rank = codec("lowrank")
    assert isinstance(open_rank, Lowrank)
    assert (open_rank.name, open_rank.rank) == ("lowrank", RANKS[-1])
    assert lowrank_codec("int8") is lowrank_codec("lowrank-3") is lowrank_codec("lowrank3x") is None


@pytest.mark.parametrize("rank", ["0", "007", "1025", "9" * 5_000])
def test_a_senseless_rank_is_refused(rank, tiny_specs) -> None:
    with pytest.raises(
        ConfigError, match=r"'lowrank\d+.*': the rank must be from 1 to 1024"
    ) as said:
        codec(f"lowrank{rank}")
    assert len(str(said.value)) < 300
    with pytest.raises(ConfigError, match=r"codec: .*the rank must be from 1 to 1024"):
        tiny_specs[0].with_changes(codec=f"lowrank{rank}")


def test_no_stranger_takes_the_name_of_a_rank(monkeypatch) -> None:
    monkeypatch.setattr(Float16, "name", "lowrank7")
    with pytest.raises(ConfigError, match=r"'lowrank7' exists already \(Lowrank\)"):
        register_codec(Float16())
