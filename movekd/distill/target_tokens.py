"""Turn a teacher's cached features into what the student learns from it.

Input: a batch of ``TeacherTargets``. Output: tokens as `distill.targets`, `grid`, `sam_layout` and
`target_clip` say. Used by ``train.model`` and ``summary``.

Legend: I views with targets, M teacher tokens, D channels.
"""

from torch import Tensor

from movekd.cache.grid import resize_tokens
from movekd.cache.targets import TeacherTargets
from movekd.distill.config import DistillConfig
from movekd.distill.sam_layout import released_sam_tokens
from movekd.distill.token_loss import limit


def decoded_tokens(targets: TeacherTargets, distill: DistillConfig) -> Tensor:
    """Return a teacher's tokens on the grid of the cache, float32 (I, M, D)."""
    if distill.targets == "standardised":
        return targets.standardised_BND
    return targets.scaled_BND if distill.targets == "scaled" else targets.tokens_BND


def target_tokens(targets: TeacherTargets, name: str, distill: DistillConfig, side: int) -> Tensor:
    """Return what the student learns from a teacher, (I, M, D): decoded, resized, limited.

    The limit comes last, so that it holds for what the loss compares, whatever grid is cached.
    """
    tokens_IMD = decoded_tokens(targets, distill)
    if distill.sam_layout == "released" and name == "sam":
        tokens_IMD = released_sam_tokens(tokens_IMD)
    if distill.grid == "student":
        tokens_IMD = resize_tokens(tokens_IMD, side)
    return limit(tokens_IMD, distill.target_clip)
