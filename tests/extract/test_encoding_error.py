"""What a seal may say of recoded tokens: never less than the true error, and little more."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.cache.codecs.interface import Codec
from movekd.cache.schema import EncodingError, ShardSeal
from movekd.cache.stats import ChannelStats
from movekd.extract.encoding_error import ErrorSums, source_error, with_recoding

WIDTH = 8
STATS = ChannelStats(torch.zeros(WIDTH), torch.ones(WIDTH))


class Stored(Codec):
    """What is stored is what decoding returns, so that any error can be given."""

    name, decoding = "stored", ""

    def arrays(self, num_tokens, width):
        raise NotImplementedError

    def encode(self, tokens_BND, stats):
        raise NotImplementedError

    def decode_standardised(self, stored, stats):
        return stored["tokens"].clone()


def measured(exact_BND, decoded_BND) -> EncodingError:
    sums = ErrorSums()
    for exact, decoded in zip(exact_BND.split(2), decoded_BND.split(2), strict=True):
        errors = Stored().error(exact, {"tokens": decoded}, STATS)
        sums.add(errors, exact.shape[0] * exact.shape[1])
    return sums.result()


def noisy(tokens_BND, size, generator):
    """Tokens with an error of another size each; a few are nearly lost."""
    noise = torch.randn(tokens_BND.shape, generator=generator)
    share = torch.rand(tokens_BND.shape[:2], generator=generator)[..., None] ** 4
    return tokens_BND + size * share * noise


def seal_of(error: EncodingError, first: int, end: int) -> ShardSeal:
    return ShardSeal(
        rows=[first, end],
        keys_xxh3_128="0" * 32,
        files={},
        skipped={},
        error=error,
        calibration="0" * 32,
    )


FIELDS = ("mean", "max", "limited_mean", "limited_max", "energy")


@given(
    seed=st.integers(0, 2**31 - 1),
    first=st.sampled_from([0.0, 1e-3, 0.1, 1.5]),
    second=st.sampled_from([0.0, 1e-3, 0.1, 1.5]),
    scale=st.sampled_from([0.01, 1.0, 6.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_error_is_above_its_bound(seed, first, second, scale) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = scale * torch.randn((4, 5, WIDTH), generator=generator)
    decoded = noisy(exact, first * scale, generator)
    again = noisy(decoded, second * scale, generator)
    source, recoding = measured(exact, decoded), measured(decoded, again)
    bound, true = with_recoding(source, recoding), measured(exact, again)
    for name in FIELDS:
        assert getattr(true, name) <= getattr(bound, name) * (1 + 1e-5) + 1e-6, name
    assert bound.num_tokens == 20
    assert (bound.recoded_mean, bound.recoded_max) == (recoding.mean, recoding.max)
    if second == 0:  # nothing was lost: the bound is the source's error
        assert bound.mean == pytest.approx(source.mean)
        assert bound.energy == pytest.approx(source.energy)


def test_the_mean_needs_the_product_of_the_two_errors() -> None:
    """mean(a) + mean(r) (1 + mean(a)) is no bound: tokens of large a may have large r."""
    exact = torch.eye(WIDTH)[None]
    size = torch.tensor([1.0] + [0.0] * (WIDTH - 1))[None, :, None]
    decoded, again = exact * (1 + size), exact * (1 + size) * (1 + size)
    source, recoding = measured(exact, decoded), measured(decoded, again)
    true = measured(exact, again).mean
    assert true > source.mean + recoding.mean * (1 + source.mean)
    assert true <= with_recoding(source, recoding).mean + 1e-9


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_the_error_of_rows_follows_from_the_seals_that_hold_them(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn((8, 3, WIDTH), generator=generator)
    decoded = noisy(exact, 0.5, generator)
    seals = [seal_of(measured(exact[i : i + 4], decoded[i : i + 4]), i, i + 4) for i in (0, 4)]
    whole, true = source_error(seals, 0, 8), measured(exact, decoded)
    for name in ("mean", "max", "limited_mean", "limited_max"):
        assert getattr(whole, name) == pytest.approx(getattr(true, name))
    assert true.energy <= whole.energy * (1 + 1e-9)
    assert whole.num_tokens == 24
    part = source_error(seals[:1], 0, 2)  # of a seal over four rows only the maximum is known
    true = measured(exact[:2], decoded[:2])
    for name in FIELDS:
        assert getattr(true, name) <= getattr(part, name) * (1 + 1e-9), name


def test_seals_of_earlier_versions_have_fewer_figures() -> None:
    old = EncodingError(mean=0.01, max=0.02, num_tokens=4)
    found = source_error([seal_of(old, 0, 4)], 0, 8)
    assert (found.limited_mean, found.limited_max) == (None, None)
    assert found.energy == pytest.approx(0.02**2)  # no token lost more
    bound = with_recoding(found, EncodingError(**dict.fromkeys(FIELDS, 0.01), num_tokens=4))
    assert bound.limited_mean is bound.limited_max is None
    assert math.sqrt(bound.energy) == pytest.approx(0.02 + 0.1 * 1.02)


def test_rows_without_features_have_no_error() -> None:
    empty = ErrorSums().result()
    assert source_error([seal_of(empty, 0, 0)], 0, 8) == empty
    bound = with_recoding(empty, empty)
    assert (bound.mean, bound.max, bound.energy, bound.num_tokens) == (0, 0, 0, 0)
