"""Build the HTML of the web page; every inserted value is escaped or a number.

Input: ``TokenPanel`` objects of ``browser`` and answers of ``evaluate.chat``. Output: HTML for
``gradio_app``.
"""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from movekd.view.browser import TokenPanel
from movekd.view.thumbnails import NUM_SHOWN, Thumbnail, Thumbnails

SCRIPT = """
element.addEventListener('mousemove', (event) => {
  const pane = event.target.closest('.movekd-pane');
  if (!pane || !pane.closest('[data-nearest]')) return;
  const box = pane.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
  if (x < 0 || y < 0 || x >= 1 || y >= 1) return;
  element.querySelectorAll('[data-nearest]').forEach((teacher) => {
    const side = Number(teacher.dataset.side);
    const token = Math.floor(y * side) * side + Math.floor(x * side);
    teacher.near ??= JSON.parse(teacher.dataset.nearest);
    teacher.cosine ??= JSON.parse(teacher.dataset.cosine);
    const near = teacher.near[token], cosine = teacher.cosine[token];
    const square = (at, kind) => `<rect class="${kind}" x="${at % side}" ` +
      `y="${Math.floor(at / side)}" width="1" height="1"/>`;
    const marks = near.map((at) => square(at, 'near')).join('') + square(token, 'here');
    teacher.querySelectorAll('svg').forEach((svg) => { svg.innerHTML = marks; });
    teacher.querySelector('.movekd-said').textContent =
      `token ${token}: nearest ${near.join(', ')}; cosine ${cosine.join(', ')}`;
  });
});
"""
"""Hovering over a token marks it and its nearest tokens, for every teacher."""

IMAGE_TEMPLATE = """
<div class="movekd-file">
  ${value
    ? '<img alt="" src="data:image/*;base64,' + value + '">' +
      '<button type="button">Remove Image</button>'
    : '<label>Image. Default: that of the cache <input type="file" accept="image/*"></label>'}
  <div role="status"></div>
</div>
"""
"""Choice of an image; the value is its file in base64. Nothing is uploaded to a folder."""

IMAGE_SCRIPT = """
element.addEventListener('change', (event) => {
  const file = event.target.files && event.target.files[0];
  if (!file) return;
  if (file.size > 16777216) {
    element.querySelector('[role=status]').textContent =
      'The image has more than 16 MiB; choose a smaller one.';
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { props.value = reader.result.split(',')[1]; };
  reader.readAsDataURL(file);
});
element.addEventListener('click', (event) => {
  if (event.target.closest('button')) props.value = '';
});
"""
"""Reads the chosen file in the browser. The number is ``gate.MAX_IMAGE_BYTES``."""

GRID_SCRIPT = """
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('button[data-name]');
  if (!chosen) return;
  element.dataset.chosen = chosen.dataset.name;
  trigger('select');
});
"""
"""A click on a thumbnail stores its name, which ``GRID_CHOICE`` reads."""

GRID_CHOICE = (
    "() => document.querySelector('#grid[data-chosen], #grid [data-chosen]').dataset.chosen"
)

STYLE = """
.movekd-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
.movekd-grid { gap: .5rem; max-height: 21rem; overflow-y: auto; }
.movekd-grid button { display: flex; flex-direction: column; min-width: 0; cursor: pointer; }
.movekd-grid button { padding: .2rem; gap: .2rem; background: none; font-weight: normal; }
.movekd-grid .pane { height: 7rem; display: flex; align-items: center; justify-content: center; }
.movekd-grid .pane { width: 100%; background: #8882; border-radius: 4px; font-size: .75rem; }
.movekd-grid .pane { padding: .2rem; } .movekd-grid .warn { color: #b3261e; }
.movekd-grid img { max-width: 100%; max-height: 100%; }
.movekd-grid button:hover .pane, .movekd-grid button:focus-visible .pane { background: #48f5; }
.movekd-grid .name { width: 100%; font-size: .75rem; overflow-wrap: anywhere; }
.movekd-grid .name { line-height: 1.2; max-height: 2.4em; overflow: hidden; text-align: center; }
#found { max-height: 20rem; overflow-y: auto; }
.movekd { display: flex; flex-direction: column; gap: 1.2rem; }
.movekd h3 { margin: 0 0 .3rem; font-size: 1rem; } .movekd .warn { color: #b3261e; }
.movekd-row { display: flex; flex-wrap: wrap; gap: .6rem; }
.movekd-row figure { margin: 0; width: 15rem; }
.movekd figcaption { font-size: .8rem; opacity: .75; }
.movekd-pane { position: relative; width: 100%; aspect-ratio: 1; }
.movekd-pane img, .movekd-pane svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.movekd-pane img { image-rendering: pixelated; } .movekd-pane img.over { opacity: .6; }
.movekd rect { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; }
.movekd rect.near { stroke: #fff; } .movekd rect.here { stroke: #ff2d2d; }
.movekd-file img { max-height: 15rem; max-width: 100%; display: block; }
.movekd-curves { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
.movekd-curves figure { margin: 0; } .movekd-curves figcaption { font-weight: 600; }
.movekd-said { font-size: .8rem; min-height: 1.2em; font-variant-numeric: tabular-nums; }
.movekd-message { padding: .8rem 1rem; border-left: 4px solid #b3261e; }
.movekd-message { background: #fdecea; color: #222; }
.movekd-key { display: flex; flex-wrap: wrap; gap: 0 1em; }
.movekd-key span { white-space: nowrap; }
.movekd-key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
"""

EXPERT_COLOURS = ((230, 97, 1), (94, 60, 153), (27, 158, 119), (231, 41, 138), (102, 166, 30))


def teachers_html(panels: Sequence[TokenPanel], title: str) -> str:
    """Return the panels of all teachers."""
    parts = [f"<div>{escape(title)}</div>"]
    parts += [_teacher(panel) for panel in panels]
    return f'<div class="movekd">{"".join(parts)}</div>'


def grid_html(found: Thumbnails) -> str:
    """Return a page of thumbnails; a click on one shows its image."""
    first = (found.page - 1) * NUM_SHOWN + 1
    said = f"Images {first:,} to {first + len(found.shown) - 1:,} of {found.num_names:,}"
    if not found.shown:
        said = "The cache holds no image."
    return (
        f'<div>{said}</div><div class="movekd-grid">{"".join(map(_thumbnail, found.shown))}</div>'
    )


def message_html(text: str) -> str:
    """Return a message about a problem."""
    return f'<div class="movekd-message" role="alert">{escape(text)}</div>'


def experts_html(experts_GG: npt.NDArray[np.int8], num_experts: int, picture: Any) -> str:
    """Return the expert of each patch in one block, over the picture (uint8 RGB or None)."""
    colours = np.array([EXPERT_COLOURS[e % len(EXPERT_COLOURS)] for e in range(num_experts)])
    under = "" if picture is None else _image(picture)
    over = _image(colours[experts_GG].astype(np.uint8), "over")
    shares = np.bincount(experts_GG.ravel(), minlength=num_experts) / experts_GG.size
    key = "".join(
        f'<span><i style="background: rgb{tuple(map(int, colour))}"></i>'
        f"expert {expert}: {share:.0%}</span>"
        for expert, (colour, share) in enumerate(zip(colours, shares, strict=True))
    )
    pane = f'<figure><div class="movekd-pane">{under}{over}</div></figure>'
    row = f'<div class="movekd-row">{pane}</div><div class="movekd-key">{key}</div>'
    return f'<div class="movekd">{row}</div>'


def _teacher(panel: TokenPanel) -> str:
    features = panel.features
    spec, facts = features.spec, [f"{features.grid}x{features.grid}", features.spec.codec]
    if panel.shard_error is not None:
        mean, most = panel.shard_error
        facts.append(f"codec error {mean:.2%}, at most {most:.2%}")
    random = ' <span class="warn">random weights</span>' if spec.weights == "random" else ""
    head = f"<h3>{escape(features.teacher)} <small>{escape(', '.join(facts))}</small>{random}</h3>"
    side, panes = features.grid, []
    if features.picture_SSC is not None:
        panes.append(_pane(_image(features.picture_SSC), side, f"seen at {spec.image_size} pixels"))
    if features.colours_GGC is not None:
        colours = np.asarray(np.nan_to_num(features.colours_GGC) * 255, np.uint8)
        panes.append(_pane(_image(colours), side, "tokens, 3 principal components"))
    if features.attention_GG is not None:
        under = "" if features.picture_SSC is None else _image(features.picture_SSC)
        most = features.attention_GG.max()
        over = _image(_heat(features.attention_GG), "over")
        of = f"mean of {panel.heads} heads" if panel.heads > 1 else "mean of the heads"
        if panel.head is not None:
            of = f"head {panel.head} of 0-{panel.heads - 1}"
        panes.append(_pane(under + over, side, f"[CLS] attention, {of}, largest {most:.1%}"))
    if features.reason is not None:
        panes.append(message_html(features.reason))
    data = ""
    if panel.nearest_NK is not None and panel.cosine_NK is not None:
        cosine = json.dumps(panel.cosine_NK.astype(float).round(3).tolist())
        nearest = json.dumps(panel.nearest_NK.tolist())
        data = f' data-side="{side}" data-nearest="{nearest}" data-cosine="{cosine}"'
    return (
        f'<section data-teacher="{escape(features.teacher)}"{data}>{head}'
        f'<div class="movekd-row">{"".join(panes)}</div><div class="movekd-said"></div></section>'
    )


def _thumbnail(found: Thumbnail) -> str:
    name = escape(found.name)
    if found.jpeg is not None:
        data = base64.b64encode(found.jpeg).decode()
        pane = f'<span class="pane"><img alt="" src="data:image/jpeg;base64,{data}"></span>'
    else:
        pane = f'<span class="pane warn">{escape(found.label)}</span>'
    said = escape(f"{found.name}: {found.problem}" if found.problem else found.name)
    return (
        f'<button type="button" data-name="{name}" title="{said}">{pane}'
        f'<span class="name">{escape(found.name.rpartition("/")[2])}</span></button>'
    )


def _pane(images: str, side: int, caption: str) -> str:
    return (
        f'<figure><div class="movekd-pane">{images}'
        f'<svg viewBox="0 0 {side} {side}" preserveAspectRatio="none"></svg></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _heat(values_GG: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    from matplotlib import colormaps

    top = max(float(np.quantile(values_GG, 0.99)), 1e-12)  # a few tokens hold most of it
    return np.asarray(colormaps["inferno"](np.clip(values_GG / top, 0, 1))[..., :3] * 255, np.uint8)


def png(pixels_HWC: npt.NDArray[np.uint8]) -> bytes:
    """Return the bytes of an image file; the pixels are RGB."""
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()


def _image(pixels_HWC: npt.NDArray[np.uint8], kind: str = "") -> str:
    data = base64.b64encode(png(pixels_HWC)).decode()
    return f'<img class="{kind}" alt="" src="data:image/png;base64,{data}">'
