"""Show what `movekd probe` found: one table of all models, or JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from movekd.cli.output import print_table, say

if TYPE_CHECKING:
    from movekd.evaluate.encoder.labelled_images import LabelledImages
    from movekd.evaluate.encoder.run import ProbeScore
    from movekd.evaluate.encoder.teacher_fit import FitImages, FitScore


def as_json(
    found: "LabelledImages",
    scores: "list[ProbeScore]",
    fit: "FitImages | None",
    fit_scores: "list[FitScore]",
) -> dict[str, Any]:
    """Return what --json prints."""
    images = {
        "found": found.num_found,
        "train": len(found.train),
        "test": len(found.test),
        "skipped": found.skipped,
    }
    from movekd.evaluate.sample import MCNEMAR, describe

    about = f"95%, {describe(len(found.test))}; p: {MCNEMAR}"
    content = {"images": images, "classes": found.classes, "scores": scores, "intervals": about}
    if fit is None:
        return content
    fit_images = {"found": fit.num_found, "used": len(fit.keys), "skipped": fit.skipped}
    return content | {"fit_images": fit_images, "fits": fit_scores}


def show(
    images: Path,
    found: "LabelledImages",
    scores: "list[ProbeScore]",
    fit: "FitImages | None",
    fit_scores: "list[FitScore]",
) -> None:
    """Print the table, and what is not used."""
    from movekd.evaluate.sample import MCNEMAR, describe

    title = (
        f"{images}: {len(found.classes)} classes, {len(found.train)} train, {len(found.test)} test"
    )
    if fit is not None:
        title += f"; fit to teachers on {len(fit.keys)} of {fit.num_found} images"
    print_table(
        title,
        ["model", "probe", "feature", "score", "95% interval", "minus first", "95% interval", "p"],
        [[s.model, s.probe, s.feature, *_figures(s.accuracy, s), _p(s.p)] for s in scores]
        + [[s.model, s.measure, f"to {s.teacher}", *_figures(s.value, s), "-"] for s in fit_scores],
    )
    say(f"95% intervals {describe(len(found.test))}; p: {MCNEMAR}")
    if found.skipped:
        say(f"{len(found.skipped)} of {found.num_found} files are not used:", err=True)
        for name, reason in list(found.skipped.items())[:10]:
            say(f"{name}: {reason}", err=True)
    for reason, num in {} if fit is None else fit.skipped.items():
        say(f"the fit does not use {num} images: {reason}", err=True)


def _figures(value: float, score: "ProbeScore | FitScore") -> list[str]:
    return [
        f"{value:.3f}",
        _interval(score.interval),
        "-" if score.difference is None else f"{score.difference:+.3f}",
        _interval(score.difference_interval),
    ]


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
