"""One picture about one view of an image: a line a teacher, what it saw, said and lost.

``looks`` hands over what is drawn, `movekd cache show` writes the file or shows it in the terminal.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from movekd.view.features import FeatureView

_CELL = 2.7  # inches
_DPI = 110


def draw_sheet(looks: Sequence[FeatureView], title: str) -> Figure:
    """Return the sheet of one view.

    The columns are those that there is something for: the picture as the teacher saw it, the
    tokens as colours, the attention of [CLS] over the picture, the error of the decoded tokens.
    """
    columns = [draw for draw in (_picture, _tokens, _attention, _error) if any(map(draw, looks))]
    size = (_CELL * max(len(columns), 1) + 0.6, (_CELL + 0.35) * len(looks) + 0.6)
    figure = Figure(size, dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=9)
    lines = figure.subplots(len(looks), max(len(columns), 1), squeeze=False)
    for line, look in zip(lines, looks, strict=True):
        for panel, draw in zip(line, columns, strict=False):
            panel.set_xticks([])
            panel.set_yticks([])
            drawn = draw(look)
            if drawn is not None:
                drawn(figure, panel)
            else:
                panel.set_axis_off()
        if look.reason is not None:
            line[-1].text(0.5, 0.5, look.reason, ha="center", va="center", wrap=True, fontsize=8)
        line[0].set_title(_heading(look), fontsize=9, loc="left", fontweight="bold")
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


def _heading(look: FeatureView) -> str:
    spec, error = look.spec, look.sealed_error
    said = f"{look.teacher}  {look.grid}x{look.grid}  {spec.codec}"
    said += f" {spec.compressor}" if spec.compressor != "none" else ""
    said += f"  error {error:.2%}" if error is not None else ""
    return said + ("  RANDOM WEIGHTS" if spec.weights == "random" else "")


def _picture(look: FeatureView) -> Any:
    def draw(figure: Figure, panel: Any) -> None:
        panel.imshow(look.picture_SSC)
        panel.set_xlabel(f"seen at {look.spec.image_size} pixels", fontsize=8)

    return draw if look.picture_SSC is not None else None


def _tokens(look: FeatureView) -> Any:
    def draw(figure: Figure, panel: Any) -> None:
        panel.imshow(look.colours_GGC, interpolation="nearest")
        panel.set_xlabel("tokens, 3 principal components", fontsize=8)

    return draw if look.colours_GGC is not None else None


def _attention(look: FeatureView) -> Any:
    def draw(figure: Figure, panel: Any) -> None:
        assert look.attention_GG is not None
        side = look.grid
        if look.picture_SSC is not None:
            extent = (0, side, side, 0)
            panel.imshow(look.picture_SSC.mean(-1), cmap="gray", extent=extent)
        sink = np.quantile(look.attention_GG, 0.99)  # a few tokens own most of it
        alpha = 1.0 if look.picture_SSC is None else 0.6
        extent = (0, side, side, 0)
        panel.imshow(look.attention_GG, cmap="inferno", alpha=alpha, extent=extent, vmax=sink)
        panel.set_xlabel(f"[CLS] attention, largest {look.attention_GG.max():.1%}", fontsize=8)

    return draw if look.attention_GG is not None else None


def _error(look: FeatureView) -> Any:
    def draw(figure: Figure, panel: Any) -> None:
        assert look.error_GG is not None
        shown = panel.imshow(look.error_GG * 100, cmap="magma", vmin=0, interpolation="nearest")
        bar = figure.colorbar(shown, ax=panel, shrink=0.8)
        bar.ax.tick_params(labelsize=7)
        mean, most = look.error_GG.mean(), look.error_GG.max()
        panel.set_xlabel(f"error in %: mean {mean:.2%}, max {most:.2%}", fontsize=8)

    return draw if look.error_GG is not None else None
