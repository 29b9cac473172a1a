"""Errors of stored tokens against the teacher's: measured in a build, bounded in a recoding.

A recoded row has two errors: that of the codec that it was decoded from, and that of the codec that
encodes it again. The teacher's output is gone, so only the second one can be measured. What the
seal says is an upper bound of both together.
"""

import math
from collections.abc import Sequence

from movekd.cache.codecs import TokenErrors
from movekd.cache.schema import EncodingError, ShardSeal


class ErrorSums:
    """Errors of the tokens of a Zarr shard, while batches are encoded."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._sum, self._max, self._limited_sum, self._limited_max = 0.0, 0.0, 0.0, 0.0
        self._squared_error, self._squared_norm = 0.0, 0.0

    def add(self, errors: TokenErrors, num_tokens: int) -> None:
        """Add those of a batch."""
        self._num_tokens += num_tokens
        self._sum += errors.sum.item()
        self._max = max(self._max, errors.max.item())
        self._limited_sum += errors.limited_sum.item()
        self._limited_max = max(self._limited_max, errors.limited_max.item())
        self._squared_error += errors.squared_error.item()
        self._squared_norm += errors.squared_norm.item()

    def result(self) -> EncodingError:
        """Return what a seal says."""
        return EncodingError(
            mean=self._sum / max(self._num_tokens, 1),
            max=self._max,
            num_tokens=self._num_tokens,
            limited_mean=self._limited_sum / max(self._num_tokens, 1),
            limited_max=self._limited_max,
            energy=self._squared_error / max(self._squared_norm, 1e-30),
        )


def source_error(seals: Sequence[ShardSeal], first: int, end: int) -> EncodingError:
    """Return an upper bound of the error of the rows ``first`` to ``end``, from sealed Zarr shards.

    A seal tells means over all of its rows. If they are not all among the rows asked for, only its
    maximum bounds them.

    Args:
        seals: of the Zarr shards that hold these rows.
        first: first row.
        end: last row plus one.
    """
    errors = [seal.error for seal in seals if seal.error.num_tokens]
    is_whole = all(first <= seal.rows[0] and seal.rows[1] <= end for seal in seals)
    num_tokens = sum(error.num_tokens for error in errors)

    def mean(values: Sequence[float]) -> float:
        counted = zip(values, errors, strict=True)
        return sum(v * error.num_tokens for v, error in counted) / max(num_tokens, 1)

    def of(name: str) -> list[float] | None:
        values = [getattr(error, name) for error in errors]
        return None if None in values else values

    largest = max((error.max for error in errors), default=0.0)
    limited, limited_max, energies = of("limited_mean"), of("limited_max"), of("energy")
    limited_largest = None if limited_max is None else max(limited_max, default=0.0)
    if not is_whole:
        return EncodingError(
            mean=largest,
            max=largest,
            num_tokens=num_tokens,
            limited_mean=limited_largest,
            limited_max=limited_largest,
            energy=largest**2,
        )
    return EncodingError(
        mean=mean([error.mean for error in errors]),
        max=largest,
        num_tokens=num_tokens,
        limited_mean=None if limited is None else mean(limited),
        limited_max=limited_largest,
        # Weighted by norms that the seals do not tell; no mean exceeds the largest.
        energy=largest**2 if energies is None else max(energies, default=0.0),
    )


def with_recoding(source: EncodingError, measured: EncodingError) -> EncodingError:
    """Return an upper bound of the error of recoded tokens against the teacher's.

    With x a token of the teacher, y the same decoded from the source and w decoded again, all in
    standardised channels, a = ||y - x|| / ||x|| and r = ||w - y|| / ||y||:

        ||w - x|| / ||x||  <=  a + r (1 + a)

    The mean over tokens of r a is at most max(r) mean(a), and at most mean(r) max(a). Limiting all
    three to 8 sigma changes nothing of this. Sums of squares obey the same inequality, with the
    roots of the energy errors as a and r, because they are norms too. A token of norm 0 counts as
    without error, as in a build.

    Args:
        source: error of the source, or a bound of it.
        measured: error of the recoding against the decoded tokens of the source.
    """
    limited_mean = limited_max = energy = None
    if source.limited_mean is not None and source.limited_max is not None:
        assert measured.limited_mean is not None
        assert measured.limited_max is not None
        limited_mean, limited_max = _bound(
            source.limited_mean, source.limited_max, measured.limited_mean, measured.limited_max
        )
    if source.energy is not None:
        assert measured.energy is not None
        a, r = math.sqrt(source.energy), math.sqrt(measured.energy)
        energy = (a + r * (1 + a)) ** 2
    mean, largest = _bound(source.mean, source.max, measured.mean, measured.max)
    return EncodingError(
        mean=mean,
        max=largest,
        num_tokens=measured.num_tokens,
        limited_mean=limited_mean,
        limited_max=limited_max,
        energy=energy,
        recoded_mean=measured.mean,
        recoded_max=measured.max,
        recoded_energy=measured.energy,
    )


def _bound(a_mean: float, a_max: float, r_mean: float, r_max: float) -> tuple[float, float]:
    """Return bounds of mean and maximum of a + r (1 + a) over tokens."""
    product = min(r_max * a_mean, r_mean * a_max)
    return a_mean + r_mean + product, a_max + r_max * (1 + a_max)
