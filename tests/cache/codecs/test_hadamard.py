import numpy as np
import pytest
import scipy.linalg

from movekd.cache.codecs.hadamard import MAX_ORDER, factor_orders, hadamard_factors
from movekd.errors import CacheError

REAL_WIDTHS = (96, 256, 384, 512, 768, 1024, 1152, 1280, 1408, 1536, 1664, 2048, 3072)
SMALL = (2, 4, 8, 12, 20, 28, 36, 44, 104, 144, 200)


@pytest.mark.parametrize("order", [*SMALL, *REAL_WIDTHS])
def test_factors_are_hadamard_matrices_of_the_order(order: int) -> None:
    """So is their Kronecker product: (A (x) B)(A (x) B)' = AA' (x) BB'."""
    factors = hadamard_factors(order)
    assert np.prod([len(factor) for factor in factors]) == order
    for factor in factors:
        assert factor.dtype == np.int8
        assert set(np.unique(factor)) <= {-1, 1}
        matrix = factor.astype(int)
        assert np.array_equal(matrix @ matrix.T, len(matrix) * np.eye(len(matrix)))
    if order <= 200:
        whole = np.kron(*factors).astype(int)
        assert np.array_equal(whole @ whole.T, order * np.eye(order))


def test_powers_of_two_are_sylvesters_matrix() -> None:
    """scipy's own, for every power of two."""
    for power in range(1, 9):
        whole = np.kron(*hadamard_factors(2**power))
        assert np.array_equal(whole, scipy.linalg.hadamard(2**power))


def test_the_factors_are_near_to_each_other() -> None:
    """So that a rotation costs little."""
    for order in REAL_WIDTHS:
        left, right = factor_orders(order)
        assert left + right <= 8 * order**0.5


@pytest.mark.parametrize("order", [1, 3, 6, 52, 130, 1000_004, 2 * MAX_ORDER])
def test_an_order_without_a_matrix_is_refused(order: int) -> None:
    with pytest.raises(CacheError, match=rf"of order {order} is known.*--codec int4 or int8"):
        hadamard_factors(order)
