"""The views of an image: the whole of it and, as LLaVA-NeXT looks at it, tiles of it.

Comes in: the size of an image as a viewer shows it. Goes out: how many tiles and where, to the
catalog of a cache (whose rows are views) and to ``ImageTransform`` (which cuts them).

View 0, the base view, is the whole image as a square. The others are square tiles, row by row, of
the image in the grid that fits it best. The grid is chosen for tiles of 336 pixels, whatever the
size of the model that looks at them: all teachers have the same views of an image.

Source: transformers image_processing_utils.py (select_best_resolution, get_patch_output_size) and
models/llava_next/image_processing_pil_llava_next.py, with its default image_grid_pinpoints.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Views = Literal["base", "anyres"]
"""base: the whole image. anyres: the whole image and its tiles."""

TILE = 336
"""Side of the tiles for which grids are chosen."""

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles; of grids that fit an image equally well, the first is taken."""


def anyres_grids(widths: ArrayLike, heights: ArrayLike) -> NDArray[np.int64]:
    """Return rows and columns of tiles of each image, (N, 2).

    The grid in which most of an image's own pixels are kept; of those, the smallest.

    Args:
        widths: (N,), in pixels, as a viewer shows the image.
        heights: (N,).
    """
    width_N, height_N = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    best_N = np.zeros(len(width_N), np.int64)
    most_N = np.zeros(len(width_N), np.int64)  # pixels that the best grid so far keeps
    least_N = np.full(len(width_N), np.iinfo(np.int64).max)  # and those that it wastes
    for number, (rows, columns) in enumerate(GRIDS):
        height, width = rows * TILE, columns * TILE
        scale_N = np.minimum(width / width_N, height / height_N)
        scaled_N = (width_N * scale_N).astype(np.int64) * (height_N * scale_N).astype(np.int64)
        kept_N = np.minimum(scaled_N, width_N * height_N)
        wasted_N = width * height - kept_N
        is_better_N = (kept_N > most_N) | ((kept_N == most_N) & (wasted_N < least_N))
        best_N[is_better_N] = number
        most_N = np.where(is_better_N, kept_N, most_N)
        least_N = np.where(is_better_N, wasted_N, least_N)
    return np.array(GRIDS, np.int64)[best_N]


def anyres_grid(width: int, height: int) -> tuple[int, int]:
    """Return rows and columns of the tiles of one image."""
    rows, columns = anyres_grids([width], [height])[0].tolist()
    return rows, columns


def num_views(widths: ArrayLike, heights: ArrayLike, views: Views = "anyres") -> NDArray[np.int64]:
    """Return how many views each image has, (N,): its tiles and the base view."""
    if views == "base":
        return np.ones(len(np.asarray(widths)), np.int64)
    tiles_N: NDArray[np.int64] = anyres_grids(widths, heights).prod(axis=1)
    return 1 + tiles_N


def list_views(
    widths: ArrayLike, heights: ArrayLike, views: Views
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Return the views of all images in order, an image's one after the other.

    Returns:
        The position of each view's image in ``widths``, and the number of the view.
    """
    counts_N = num_views(widths, heights, views)
    images = np.repeat(np.arange(len(counts_N), dtype=np.int64), counts_N)
    starts_N = np.cumsum(counts_N) - counts_N
    return images, (np.arange(len(images)) - starts_N[images]).astype(np.int16)


def anyres_canvas(image: Image.Image, size: int, kernel: Image.Resampling) -> Image.Image:
    """Return the image that tiles are cut from: fitted into its grid, black around it.

    Args:
        image: RGB, upright.
        size: side of a tile; the canvas has (columns * size, rows * size) pixels.
        kernel: Pillow filter.
    """
    rows, columns = anyres_grid(image.width, image.height)
    width, height = columns * size, rows * size
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        fitted = (width, min(math.ceil(image.height * scale_x), height))
    else:
        fitted = (min(math.ceil(image.width * scale_y), width), height)
    canvas = Image.new("RGB", (width, height))
    corner = ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
    canvas.paste(image.resize(fitted, kernel), corner)
    return canvas


def cut_tile(canvas: Image.Image, size: int, view: int) -> Image.Image:
    """Return a tile of a canvas by the number of its view, from 1."""
    row, column = divmod(view - 1, canvas.width // size)
    left, top = column * size, row * size
    return canvas.crop((left, top, left + size, top + size))
