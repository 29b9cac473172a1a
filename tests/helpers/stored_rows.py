"""Small Zarr shards, and rows of a store compared with those of stock zarr."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from movekd.extract.options import BuildOptions

OPTIONS = BuildOptions(batch_size=5, num_workers=0)
ROWS = 8
"""Rows per Zarr shard."""


def assert_equal(
    stored: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], rows: Sequence[int]
) -> None:
    """Check that what was read is what the arrays hold."""
    assert stored.keys() == arrays.keys()
    for name, values in stored.items():
        np.testing.assert_array_equal(values.numpy(), arrays[name][rows])
