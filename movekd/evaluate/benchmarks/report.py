"""The result of a benchmark's scorer: one published figure, and the rows behind it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, float]


@dataclass(frozen=True)
class Report:
    """Figures of one benchmark, in percent if their name does not say otherwise.

    Attributes:
        figure: name of the figure that papers print.
        value: that figure.
        rows: figures per category; the last row is about all questions.
    """

    figure: str
    value: float
    rows: dict[str, Row]

    @property
    def columns(self) -> list[str]:
        """Names of all figures, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))


def accuracy_rows(scores: Iterable[tuple[Sequence[str], float]]) -> dict[str, Row]:
    """Return accuracy and number of questions per category, and of ``all``.

    Args:
        scores: the categories and the score (0 to 1) of each question.
    """
    found: dict[str, list[float]] = {}
    for categories, score in scores:
        for name in (*categories, "all"):
            found.setdefault(name, []).append(score)
    return {
        name: {"accuracy": 100 * sum(found[name]) / len(found[name]), "questions": len(found[name])}
        for name in sorted(found, key=lambda name: (name == "all", name))
    }


def accuracy_report(scores: Iterable[tuple[Sequence[str], float]]) -> Report:
    """Return the accuracy of all questions, with the rows of ``accuracy_rows``."""
    rows = accuracy_rows(scores)
    return Report("accuracy", rows["all"]["accuracy"], rows)
