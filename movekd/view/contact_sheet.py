"""Draw one sheet about one view of an image: one row per teacher, one column per kind of panel.

Input: ``FeatureView`` objects. Output: a matplotlib figure, for `movekd cache show`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from movekd.errors import shorten
from movekd.view.features import FeatureView

_CELL = 2.7  # inches
_DPI = 110


def draw_sheet(views: Sequence[FeatureView], title: str) -> Figure:
    """Return the sheet of one view.

    Columns: the input of the teacher, the tokens as colours, the attention of [CLS], the error of
    the decoded tokens. A column without any panel is left out.
    """
    columns = {
        field: draw
        for field, draw in _PANELS.items()
        if any(getattr(features, field) is not None for features in views)
    }
    size = (_CELL * max(len(columns), 1) + 0.6, (_CELL + 0.35) * len(views) + 0.6)
    figure = Figure(size, dpi=_DPI, layout="constrained")
    # image names may hold anything; a dollar sign would begin a formula
    figure.suptitle(shorten(title), fontsize=9, parse_math=False)
    rows = figure.subplots(len(views), max(len(columns), 1), squeeze=False)
    for row, features in zip(rows, views, strict=True):
        for panel, (field, draw) in zip(row, columns.items(), strict=False):
            panel.set_xticks([])
            panel.set_yticks([])
            if getattr(features, field) is None:
                panel.set_axis_off()
            else:
                draw(panel, features)
        if features.reason is not None:
            row[-1].text(0.5, 0.5, features.reason, ha="center", va="center", wrap=True, fontsize=8)
        row[0].set_title(_heading(features), fontsize=9, loc="left", fontweight="bold")
    return figure


def save_sheet(figure: Figure, path: Path) -> None:
    """Write a sheet as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def as_image(figure: Figure) -> Image.Image:
    """Return a sheet as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _heading(features: FeatureView) -> str:
    spec, error = features.spec, features.sealed_error
    text = f"{features.teacher}  {features.grid}x{features.grid}  {spec.codec}"
    text += f" {spec.compressor}" if spec.compressor != "none" else ""
    text += f"  error {error:.2%}" if error is not None else ""
    return text + ("  RANDOM WEIGHTS" if spec.weights == "random" else "")


def _picture(panel: Any, features: FeatureView) -> None:
    panel.imshow(features.picture_SSC)
    panel.set_xlabel(f"seen at {features.spec.image_size} pixels", fontsize=8)


def _tokens(panel: Any, features: FeatureView) -> None:
    panel.imshow(features.colours_GGC, interpolation="nearest")
    panel.set_xlabel("tokens, 3 principal components", fontsize=8)


def _attention(panel: Any, features: FeatureView) -> None:
    assert features.attention_GG is not None
    extent, alpha = (0, features.grid, features.grid, 0), 1.0
    if features.picture_SSC is not None:
        panel.imshow(features.picture_SSC.mean(-1), cmap="gray", extent=extent)
        alpha = 0.6
    sink = np.quantile(features.attention_GG, 0.99)  # a few tokens hold most of the attention
    panel.imshow(features.attention_GG, cmap="inferno", alpha=alpha, extent=extent, vmax=sink)
    panel.set_xlabel(f"[CLS] attention, largest {features.attention_GG.max():.1%}", fontsize=8)


def _error(panel: Any, features: FeatureView) -> None:
    assert features.error_GG is not None
    shown = panel.imshow(features.error_GG * 100, cmap="magma", vmin=0, interpolation="nearest")
    bar = panel.figure.colorbar(shown, ax=panel, shrink=0.8)
    bar.ax.tick_params(labelsize=7)
    mean, most = features.error_GG.mean(), features.error_GG.max()
    panel.set_xlabel(f"error in %: mean {mean:.2%}, max {most:.2%}", fontsize=8)


_PANELS = {
    "picture_SSC": _picture,
    "colours_GGC": _tokens,
    "attention_GG": _attention,
    "error_GG": _error,
}
"""Field of ``FeatureView`` -> what draws it, in the order of the columns."""
