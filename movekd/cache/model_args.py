"""Limits of ``model_args`` in a spec: plain values of sizes that a network can have.

Each library knows its own keys, so these limits go by the kind of a key. They keep a typing error
or a stranger's file from asking for more memory than any machine has. ``spec`` uses them.
"""

import math
import re
from typing import Any

MAX_WIDTH = 32_768
MAX_LAYERS = 1_000
MAX_NUMBER = 2**20
MAX_VALUES = 1_000
MAX_TEXT = 1_000
MAX_KEY = 100
_MAX_DEPTH = 4

_LAYERS = re.compile(r"(num_(hidden_)?layers|layers|depths?)")
_WIDTH = re.compile(r"(.*_)?(size|dim|dims|channels|heads|width)|d_(ff|kv|model)")
_MAY_BE_ZERO = {"projection_dim", "window_size"}
_NO_WIDTH = {"vocab_size"}


def check_model_args(args: dict[str, Any]) -> dict[str, Any]:
    """Return ``args``.

    Raises:
        ValueError: a value has another type, is not finite, or lies outside of its limits.
    """
    left = [MAX_VALUES]
    for key, value in args.items():
        _check_key(key)
        _check(key, value, key, 1, left)
    return args


def _check(key: str, value: Any, where: str, depth: int, left: list[int]) -> None:
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {MAX_VALUES:,} values; expected those of one architecture")
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for name, part in value.items():
            _check_key(name)
            _check(name, part, f"{where}.{name}", depth + 1, left)
    elif isinstance(value, list | tuple):
        for part in value:
            _check(key, part, where, depth + 1, left)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT or not value.isprintable():
            raise ValueError(
                f"{where} holds control characters or more than {MAX_TEXT:,} characters"
            )
    elif isinstance(value, int) and not isinstance(value, bool):
        low, high = _range(key)
        if not low <= value <= high:
            raise ValueError(f"{where} must be from {low:,} to {high:,}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; expected a finite number")
    elif value is not None and not isinstance(value, bool):
        raise ValueError(f"{where} is a {type(value).__name__}; expected numbers, text or lists")


def _check_key(key: object) -> None:
    if not isinstance(key, str) or len(key) > MAX_KEY or not key.isprintable():
        raise ValueError(f"a key is {key!r:.80}; expected text of at most {MAX_KEY} characters")


def _range(key: str) -> tuple[int, int]:
    """Return the smallest and the largest number that a key may have."""
    if _LAYERS.fullmatch(key):
        return 1, MAX_LAYERS
    if _WIDTH.fullmatch(key) and key not in _NO_WIDTH:
        return (0 if key in _MAY_BE_ZERO else 1), MAX_WIDTH
    return -MAX_NUMBER, MAX_NUMBER
