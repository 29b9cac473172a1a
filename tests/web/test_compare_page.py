"""The page of `movekd report --compare` in Chromium: it loads nothing and fits the window."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from movekd.view.arms import read_compared
from movekd.view.compare_page import write_comparison
from movekd.view.comparison import compare_runs
from sweep import entries, write_compared

pytestmark = pytest.mark.web


@pytest.fixture
def comparison(tmp_path: Path, corpus_dir: Path) -> Path:
    """The page of two arms of two seeds, which differ in many keys."""
    changes = ("student.mole.r=8", "training.weight_decay=0.1", "training.max_grad_norm=0.5")
    runs = []
    for seed in (0, 1):
        for name, keys in (("a", ()), ("b", (*changes, "data.model_max_length=512"))):
            log = entries([2.0, 1.5, 1.0, 0.5], held_out=[1.0, 0.5 + seed / 8])
            keys = ("data.val_size=4", "training.eval_steps=2", *keys)
            folder = tmp_path / f"{name}{seed}"
            runs.append(write_compared(folder, corpus_dir, seed, *keys, log=log))
    path = tmp_path / "comparison.html"
    write_comparison(compare_runs([read_compared(str(run)) for run in runs]), path)
    return path


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_fits_the_window_and_asks_for_nothing(
    chromium: Browser, comparison: Path, width: int
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900})
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(comparison.as_uri())
    hidden = page.get_by_text("loss_text, final", exact=False).last
    assert not hidden.is_visible()  # figures of training are folded away
    page.get_by_text("training", exact=True).last.click()
    assert hidden.is_visible()
    for details in page.locator("details").all():
        details.evaluate("one => { one.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = page.locator("figure svg").all()
    assert len(figures) == 4
    for figure in figures:
        box = figure.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= width
    assert asked == [comparison.as_uri()]
    context.close()
