"""Tests of movekd.view.plots."""

from pathlib import Path

from movekd.view.plots import run_figures
from movekd.view.run_log import RunLog


def labels(**logged: float) -> list[str]:
    """Return what the lines of the learning rates are called in a run that logged these."""
    steps = [{"step": step, "loss": 1.0, "learning_rate": 1e-3, **logged} for step in (1, 2)]
    figures = dict(run_figures(RunLog(Path("run"), {}, steps, {}, [])))
    axes = figures["Learning rate"].axes[0]
    legend = axes.get_legend()
    return [axes.get_ylabel()] if legend is None else [t.get_text() for t in legend.get_texts()]


def test_each_part_with_a_rate_has_its_curve() -> None:
    assert labels() == ["learning rate"]
    found = labels(learning_rate_projector=2e-5, learning_rate_heads=1e-2)
    assert found == ["the other parts", "heads", "projector"]
