"""Bootstrap intervals of what a probe finds, over the images that it is read on.

An interval says how much other images of the same kind would change the figure. It says nothing
about other training seeds.
"""

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 2000
Interval = tuple[float, float]


def bootstrap_interval(values_N: npt.NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the 95% percentile interval of the mean over resampled values."""
    rng, count = np.random.default_rng(seed), len(values_N)
    means = [values_N[rng.integers(0, count, count)].mean() for _ in range(NUM_RESAMPLES)]
    return percentiles(np.array(means))


def percentiles(values_R: npt.NDArray[np.float64]) -> Interval:
    """Return the middle 95% of a figure's values on resamples."""
    low, high = np.nanquantile(values_R, [0.025, 0.975])
    return float(low), float(high)
