"""Show what `movekd evaluate` found: figures, their intervals, and a paired comparison."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from movekd.cli.output import print_table, say

if TYPE_CHECKING:
    from movekd.evaluate.benchmarks.baseline import Baseline
    from movekd.evaluate.benchmarks.report import Report
    from movekd.evaluate.sample import Comparison, Sample


def print_report(title: str, report: "Report") -> None:
    """Print the table; the interval is that of the column that papers print."""
    from movekd.evaluate.sample import describe

    sample, columns = report.sample, ["", *(name.replace("_", " ") for name in report.columns)]
    title = f"{title} {report.value:.2f}"
    if sample is not None:
        title += f" (95% interval {_range(sample.interval)})"
        columns.append(f"95% interval of {sample.headline[1]}")
    rows = []
    for name, row in report.rows.items():
        cells = [name, *(_cell(row.get(column)) for column in report.columns)]
        if sample is not None:
            interval = sample.intervals.get(name, {}).get(sample.headline[1])
            cells.append("-" if interval is None else _range(interval))
        rows.append(cells)
    print_table(title, columns, rows)
    if sample is None:
        say("no interval: the benchmark's scorer returns a Report without a sample")
        return
    say(f"95% intervals {describe(sample.num_images)}")
    if sample.caution is not None:
        say(sample.caution)


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def intervals_json(sample: "Sample") -> dict[str, object]:
    """Return what --json says about the intervals."""
    from movekd.evaluate.sample import describe

    return {
        "about": f"95%, {describe(sample.num_images)}",
        "caution": sample.caution,
        "images": sample.num_images,
        "figure": sample.interval,
        "rows": sample.intervals,
    }


def comparison_json(
    comparison: "Comparison | None", baseline: "Baseline | None"
) -> dict[str, object] | None:
    """Return what --json says about the comparison."""
    if comparison is None or baseline is None:
        return None
    about = {"model": baseline.model_id, "answers": baseline.path, "caution": baseline.caution}
    return asdict(comparison) | {"baseline": about | {"value": comparison.baseline}}


def comparison_lines(comparison: "Comparison | None", baseline: "Baseline | None") -> list[str]:
    """Return the lines about the comparison, in percent or points."""
    from movekd.evaluate.sample import describe_test

    if comparison is None or baseline is None:
        return []
    low, high = comparison.interval
    lines = [
        f"minus the baseline '{baseline.model_id}' ({comparison.baseline:.2f}): "
        f"{comparison.difference:+.2f}, 95% interval {low:+.2f} to {high:+.2f}, "
        f"p {p_words(comparison.p)} ({describe_test(comparison.test)})"
    ]
    return lines if baseline.caution is None else [*lines, baseline.caution]


def p_words(value: float) -> str:
    """Return a p value with its sign, as in p < .0001."""
    return "< .0001" if value < 0.0001 else f"= {value:.4f}".replace("0.", ".", 1)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
