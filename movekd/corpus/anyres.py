"""Choose and cut the views of an image: the whole image and LLaVA-NeXT's tiles.

Input: the size of an image in pixels, after EXIF rotation. Output: the number of tiles and their
places. Used by the catalog of a cache, whose rows are views, and by ``ImageTransform``.

View 0, the base view, is the whole image as a square. The other views are square tiles, row by
row, of the image in the grid that fits it best. The grid is chosen for tiles of 336 pixels,
whatever the model's input size, so that all teachers have the same views of an image.

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
"""Side in pixels of the tiles for which a grid is chosen."""

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles; among grids that fit an image equally well, the first is taken."""


def anyres_grids(widths: ArrayLike, heights: ArrayLike) -> NDArray[np.int64]:
    """Return rows and columns of tiles for each image, (N, 2).

    The chosen grid keeps most of the image's own pixels; among equals it is the smallest.

    Args:
        widths: (N,), in pixels, after EXIF rotation.
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
    """Return the number of views of each image, (N,): its tiles and the base view."""
    if views == "base":
        return np.ones(len(np.asarray(widths)), np.int64)
    tiles_N: NDArray[np.int64] = anyres_grids(widths, heights).prod(axis=1)
    return 1 + tiles_N


def list_views(
    widths: ArrayLike, heights: ArrayLike, views: Views
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Return the views of all images in order; the views of an image follow each other.

    Returns:
        The position of each view's image in ``widths``, and the number of the view.
    """
    counts_N = num_views(widths, heights, views)
    images = np.repeat(np.arange(len(counts_N), dtype=np.int64), counts_N)
    starts_N = np.cumsum(counts_N) - counts_N
    return images, (np.arange(len(images)) - starts_N[images]).astype(np.int16)


def anyres_canvas(image: Image.Image, size: int, kernel: Image.Resampling) -> Image.Image:
    """Return the image fitted into its grid, with black around it; tiles are cut from it.

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
    """Return the tile of a canvas that is view number ``view``, counted from 1."""
    row, column = divmod(view - 1, canvas.width // size)
    left, top = column * size, row * size
    return canvas.crop((left, top, left + size, top + size))
