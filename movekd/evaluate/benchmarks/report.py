"""What a benchmark's scorer returns: one published figure, and the rows behind it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, float]


@dataclass(frozen=True)
class Report:
    """Figures of one benchmark, in percent unless their name says otherwise.

    Attributes:
        figure: name of the figure that papers print.
        value: that figure.
        rows: figures a category; the last row is the whole.
    """

    figure: str
    value: float
    rows: dict[str, Row]

    @property
    def columns(self) -> list[str]:
        """Every figure that a row has, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))


def accuracy_rows(scores: Iterable[tuple[Sequence[str], float]]) -> dict[str, Row]:
    """Return accuracy and number of questions a category, and of ``all``.

    Args:
        scores: for each question the categories it counts in, and its score from 0 to 1.
    """
    found: dict[str, list[float]] = {}
    whole: list[float] = []
    for categories, score in scores:
        whole.append(score)
        for category in categories:
            found.setdefault(category, []).append(score)
    rows = {name: _row(found[name]) for name in sorted(found)}
    return rows | {"all": _row(whole)}


def _row(scores: Sequence[float]) -> Row:
    return {"accuracy": 100 * sum(scores) / len(scores), "questions": len(scores)}
