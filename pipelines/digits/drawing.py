"""Draw what scenes are composed of: enlarged scans in their cells, backgrounds, clutter strokes.

Dimensions: B scenes, C the four cells (row by row), K strokes, H and W pixels, S pixels of a cell's
side, R a scan's side (8).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SIZE = 48  # pixels of a scene's side
CELL = SIZE // 2  # pixels of a cell's side
SCAN = 8  # pixels of a scan's side


def place(scans_BCRR: Floats, rng: np.random.Generator) -> Floats:
    """Return each scan enlarged and moved inside its cell, (B, C, 24, 24)."""
    shape = scans_BCRR.shape[:2]
    height_BC = rng.uniform(14, 20, shape)
    width_BC = (height_BC * rng.uniform(0.8, 1.1, shape)).clip(13, 20)
    rows_BCSR = interpolation(height_BC, rng.uniform(1, CELL - 1 - height_BC))
    columns_BCSR = interpolation(width_BC, rng.uniform(1, CELL - 1 - width_BC))
    return np.asarray(rows_BCSR @ scans_BCRR @ columns_BCSR.swapaxes(2, 3), np.float32)


def interpolation(extent_BC: NDArray[Any], start_BC: NDArray[Any]) -> Floats:
    """Return bilinear weights (B, C, 24, 8) that stretch 8 pixels to ``extent`` at ``start``."""
    pixel_S = np.arange(CELL, dtype=np.float32) + 0.5
    source_BCS = (pixel_S - start_BC[..., None]) / extent_BC[..., None] * SCAN - 0.5
    distance_BCSR = np.abs(source_BCS[..., None] - np.arange(SCAN))
    return np.asarray((1 - distance_BCSR).clip(0, None), np.float32)


def join_cells(cells_BCSS: Floats) -> Floats:
    """Return the 48x48 scene of four 24x24 cells."""
    grid = cells_BCSS.reshape(-1, 2, 2, CELL, CELL).transpose(0, 1, 3, 2, 4)
    return grid.reshape(-1, SIZE, SIZE)


def background(num_scenes: int, rng: np.random.Generator) -> Floats:
    """Return a grey level with a linear gradient per scene, (B, H, W)."""
    level, slope_y, slope_x = rng.uniform(-0.5, 0.5, (3, num_scenes, 1, 1)).astype(np.float32)
    axis = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    slope_BHW = slope_y * axis[:, None] + slope_x * axis[None, :]
    return np.asarray(0.2 + 0.25 * level + 0.3 * slope_BHW, np.float32)


def clutter(num_scenes: int, rng: np.random.Generator, strokes: int) -> Floats:
    """Return up to ``strokes`` short straight strokes per scene, (B, H, W); 0 elsewhere."""
    shape = (num_scenes, strokes, 1, 1)
    centre_y, centre_x = rng.uniform(0, SIZE, (2, *shape)).astype(np.float32)
    angle = rng.uniform(0, np.pi, shape).astype(np.float32)
    half_length = rng.uniform(2, 7, shape).astype(np.float32)
    level = rng.uniform(0.3, 0.8, shape).astype(np.float32) * (rng.random(shape) < 0.6)
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    dy, dx = axis[:, None] - centre_y, axis[None, :] - centre_x
    along = np.abs(dx * np.cos(angle) + dy * np.sin(angle)) - half_length
    across = dy * np.cos(angle) - dx * np.sin(angle)
    distance_BKHW = np.sqrt(across**2 + along.clip(0, None) ** 2)
    return np.asarray((level * (1.6 - distance_BKHW).clip(0, 1)).max(1), np.float32)
