"""Count the tokens of a LLaVA-NeXT image.

The model sees the views of ``corpus.anyres``: the whole image, stretched, and tiles. The prompt
holds the tokens of the whole image, then the tokens of its tiles as one picture, row by row, with a
learned token after each row. Rows and columns that show only padding are left out.

Used by ``vlm``. All numbers are transformers'.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from movekd.corpus.anyres import GRIDS, TILE, anyres_grids

GRID_PINPOINTS = [[rows * TILE, columns * TILE] for rows, columns in GRIDS]
"""Height and width in pixels of the canvases that tiles are cut from, as LlavaNextConfig wants."""


def count_anyres_tokens(widths: ArrayLike, heights: ArrayLike, side: int) -> NDArray[np.int64]:
    """Return how many tokens each image has in the prompt, (N,).

    Args:
        widths: (N,), in pixels, as a viewer shows the image.
        heights: (N,).
        side: patches per side of a view.

    Source: transformers models/llava_next/processing_llava_next.py (_get_unpadded_features) and
    modeling_llava_next.py (unpad_image).
    """
    width_N, height_N = np.asarray(widths, np.float64), np.asarray(heights, np.float64)
    grid_N2 = anyres_grids(widths, heights) * side
    rows_N, columns_N = grid_N2[:, 0], grid_N2[:, 1]
    is_wide_N = width_N / height_N > columns_N / rows_N
    shown_rows_N = np.round(height_N * (columns_N / width_N), 7).astype(np.int64)
    shown_columns_N = np.round(width_N * (rows_N / height_N), 7).astype(np.int64)
    rows_N = np.where(is_wide_N, rows_N - (rows_N - shown_rows_N) // 2 * 2, rows_N)
    columns_N = np.where(is_wide_N, columns_N, columns_N - (columns_N - shown_columns_N) // 2 * 2)
    tokens_N: NDArray[np.int64] = side * side + rows_N * columns_N + rows_N
    return tokens_N
