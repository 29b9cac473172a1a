"""The result of a benchmark's scorer: one published figure, and the rows behind it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from movekd.evaluate.sample import ALL, Sample, Scored, accuracy_sample

Row = dict[str, float]


@dataclass(frozen=True)
class Report:
    """Figures of one benchmark, in percent if their name does not say otherwise.

    Attributes:
        figure: name of the figure that papers print.
        value: that figure.
        rows: figures per category; the last row is about all questions.
        sample: what the figures were computed from, for intervals and comparisons; None for a
            scorer that does not say it.
    """

    figure: str
    value: float
    rows: dict[str, Row]
    sample: Sample | None = field(default=None, repr=False, compare=False)

    @property
    def columns(self) -> list[str]:
        """Names of all figures, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))


def accuracy_report(
    scored: Iterable[Scored], headline: str = ALL, figure: str = "accuracy"
) -> Report:
    """Return accuracy and number of questions per category, and of ``all``.

    Args:
        scored: the score of each question.
        headline: the row whose accuracy papers print.
        figure: its name.
    """
    sample = accuracy_sample(scored, headline)
    rows: dict[str, Row] = sample.rows()
    for row, num_questions in zip(rows.values(), sample.counts_QS[:, 1::2].sum(0), strict=True):
        row["questions"] = int(num_questions)
    return Report(figure, rows[headline]["accuracy"], rows, sample)
