"""Say what a student's projector makes of the patches, and count an image's tokens in the prompt.

The KD loss compares the patch tokens of the tower. The language model reads what the projector
makes of them: one token per patch (``mlp2x_gelu``), or one per 2 x 2 patches (``pixel_shuffle``).

Used by ``vlm``, ``llava`` and the exports. The class of ``pixel_shuffle`` is in
``export.modeling_movekd``, because exports carry its code.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from movekd.corpus.anyres import Views
from movekd.errors import ConfigError
from movekd.student.config import ProjectorType
from movekd.student.export.modeling_movekd import MovekdPixelShuffle
from movekd.student.llava_next import count_anyres_tokens

FACTORS: dict[ProjectorType, int] = {"mlp2x_gelu": 1, "pixel_shuffle": MovekdPixelShuffle.factor}
"""Patches per side of the square that becomes one token."""


def projector_type(vlm: Any) -> ProjectorType:
    """Return the type of a model's projector; an encoder without one counts as ``mlp2x_gelu``."""
    projector = getattr(vlm.model, "multi_modal_projector", None)
    return "pixel_shuffle" if isinstance(projector, MovekdPixelShuffle) else "mlp2x_gelu"


def patch_grid(vision_config: Any) -> int:
    """Return the patches per side of a view, which the KD loss compares."""
    return int(vision_config.image_size) // int(vision_config.patch_size)


def prompt_grid(kind: ProjectorType, vision_config: Any) -> int:
    """Return the tokens per side of a view that the projector gives to the language model.

    Args:
        kind: the type of the projector.
        vision_config: the tower's.

    Raises:
        ConfigError: the patches of a view cannot be divided into squares.
    """
    patches, factor = patch_grid(vision_config), FACTORS[kind]
    if patches % factor:
        raise ConfigError(
            f"student.projector_type: {kind} makes one token of {factor} x {factor} patches, and "
            f"the vision tower has {patches} x {patches} (image_size {vision_config.image_size}, "
            f"patch_size {vision_config.patch_size}); expected a multiple of {factor} per side. "
            "Take another tower or image size, or projector_type: mlp2x_gelu."
        )
    return patches // factor


def count_image_tokens(
    views: Views, grid: int, widths: ArrayLike, heights: ArrayLike
) -> NDArray[np.int64]:
    """Return how many tokens each image has in the prompt, (N,).

    Args:
        views: the views of an image that the model looks at.
        grid: tokens per side of a view, see ``prompt_grid``.
        widths: (N,), in pixels.
        heights: (N,).
    """
    if views == "anyres":
        return count_anyres_tokens(widths, heights, grid)
    return np.full(len(np.asarray(widths)), grid**2, np.int64)
