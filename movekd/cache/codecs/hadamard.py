"""Hadamard matrices: rotations that cost two small matrix products.

A Hadamard matrix H of order D has entries 1 and -1 and orthogonal rows: H H' = D I. So H / sqrt(D)
is a rotation, and each of its outputs is a sum of all inputs with signs: values of any distribution
come out nearly normal. Orders above 2 are multiples of 4; not every one is known.

H is a Kronecker product here, H = left (x) right, because H x is then left X right', with x as a
matrix X: D (m + n) multiplications per token instead of D * D.

Sources: Sylvester (1867) for powers of two; Paley (1933) for the others.
"""

from math import isqrt
from typing import TYPE_CHECKING

from movekd.errors import CacheError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Matrix = npt.NDArray[np.int8]

MAX_BASE = 512
"""Largest order that is not divided further. A larger one would cost more than it is worth."""
MAX_ORDER = 2**16


def factor_orders(order: int) -> tuple[int, int]:
    """Return the orders of the two factors, left and right, as near to each other as they can be.

    Raises:
        CacheError: no Hadamard matrix of this order can be built here.
    """
    base = _smallest_base(order) if 2 <= order <= MAX_ORDER else None
    if base is None or base > MAX_BASE:
        raise CacheError(
            f"no Hadamard matrix of order {order} is known here, so tokens of {order} channels "
            "cannot be rotated; use --codec int4 or int8, which rotate nothing."
        )
    lefts = [base * 2**k for k in range((order // base).bit_length())]
    left = min(lefts, key=lambda left: max(left, order // left))
    return left, order // left


def hadamard_factors(order: int) -> "tuple[Matrix, Matrix]":
    """Return two Hadamard matrices whose Kronecker product is one of this order, int8.

    Raises:
        CacheError: no Hadamard matrix of this order can be built here.
    """
    left, right = factor_orders(order)
    return _hadamard(left), _hadamard(right)


def _hadamard(order: int) -> "Matrix":
    """Return a Hadamard matrix: its smallest base, doubled by Sylvester's rule."""
    import numpy as np

    base = _smallest_base(order)
    assert base is not None
    matrix: Matrix = np.ones((1, 1), np.int8) if base == 1 else _paley(base)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _smallest_base(order: int) -> int | None:
    """Return the smallest order that Sylvester's doubling can start from, or None."""
    found = None
    while order >= 1:
        if order == 1 or _paley_prime(order) is not None:
            found = order
        if order % 2:
            break
        order //= 2
    return found


def _paley_prime(order: int) -> int | None:
    """Return the prime q of Paley's construction: order = q + 1, or 2 (q + 1); None without one."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _is_prime(half) else None


def _paley(order: int) -> "Matrix":
    """Return Paley's matrix. Its core says which differences are squares modulo the prime."""
    import numpy as np

    prime = _paley_prime(order)
    assert prime is not None
    character = np.full(prime, -1, np.int8)
    character[np.arange(prime) ** 2 % prime] = 1
    character[0] = 0
    at = np.arange(prime)
    bordered = np.ones((prime + 1, prime + 1), np.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(at[:, None] - at) % prime]
    identity = np.eye(prime + 1, dtype=np.int8)
    if order == prime + 1:  # the core is skew, and so is the matrix with this border
        bordered[1:, 0] = -1
        return bordered + identity
    return np.kron(bordered, np.array([[1, 1], [1, -1]], np.int8)) + np.kron(
        identity, np.array([[1, -1], [-1, -1]], np.int8)
    )


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
