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


def may_rotate(distill: DistillConfig) -> bool:
    """Return whether the KD loss is the same if targets and predictions are rotated together.

    A squared error is. Limits, other forms, and the weights that compare a target with the anchor's
    [CLS] are not. Then the targets of a codec that rotates need no way back.
    """
    return (
        distill.adapters == "student"
        and distill.targets == "standardised"
        and distill.loss in (None, "mse")
        and not distill.target_clip
        and distill.teacher_weighting != "anchor"
    )


def target_tokens(
    targets: TeacherTargets,
    name: str,
    distill: DistillConfig,
    side: int,
    *,
    is_rotated: bool = False,
) -> Tensor:
    """Return what the student learns from a teacher, (I, M, D): decoded, resized, limited.

    The limit comes last, so that it holds for what the loss compares, whatever grid is cached.
    With ``is_rotated`` the tokens stay in the codec's rotation, see ``may_rotate``.
    """
    tokens_IMD = targets.rotated_BND if is_rotated else decoded_tokens(targets, distill)
    if distill.sam_layout == "released" and name == "sam":
        tokens_IMD = released_sam_tokens(tokens_IMD)
    if distill.grid == "student":
        tokens_IMD = resize_tokens(tokens_IMD, side)
    return limit(tokens_IMD, distill.target_clip)
