"""Figures of a study's report as pages quote them: points with an interval over worlds, and p."""

import re
from typing import Any

INTERVAL = re.compile(r"([+-]?\d+\.\d) \((-?\d+\.\d) to (-?\d+\.\d)\)")
DECIMAL = re.compile(r"(?<![\d.\w])\d*\.\d+(?:e-\d+)?")


def points(share: float) -> str:
    """Return a share in points."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0")


def ends(found: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Return difference and bounds as pages write them, for both orders of the arms."""
    if found["low"] is None:
        return set()
    mean, low, high = (found[key] for key in ("difference", "low", "high"))
    return {
        (points(mean), points(low), points(high)),
        (points(-mean), points(-high), points(-low)),
    }


def decimals(p: float) -> str:
    """Return p with two digits."""
    return f"{p:#.2g}".removeprefix("0")


def intervals(text: str) -> list[tuple[str, str, str]]:
    """Return every difference with its interval that a text quotes."""
    return [(m.lstrip("+"), low, high) for m, low, high in INTERVAL.findall(text)]
