"""Run the tower once per teacher, with only its expert and the shared ones to choose from.

Input: the pixels of the images with targets. Output: per teacher, the tokens that its KD loss is
taken of. One small pass per teacher, not one of all: neither keeps fewer activations, and no pixels
are copied. A pass runs the whole tower, though blocks behind the layer that is read are not needed:
their share is small (one block of 24 in CLIP-L), and they get no backward pass. Used by ``model``.

Legend: I images with targets, N student tokens, D student width, C H W the pixels of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from movekd.distill import choice_share
from movekd.student import restricted, routing
from movekd.student.hidden_state import patch_tokens, tower_hidden_state


class TeacherPass(NamedTuple):
    """What one teacher's pass gave.

    Attributes:
        tokens_IND: the student's patch tokens, with gradient to the teacher's expert, the shared
            ones and their routers, and to no other teacher's.
        own_share: share of the tokens of all layers, [CLS] included, that chose the teacher's
            expert; a scalar without gradient.
    """

    tokens_IND: Tensor
    own_share: Tensor


def teacher_passes(vlm: Any, pixels_ICHW: Tensor, teachers: Sequence[str]) -> list[TeacherPass]:
    """Return each teacher's pass, in order.

    Raises:
        ConfigError: a teacher has no expert.
    """
    passes = []
    for teacher in teachers:
        with restricted(vlm, teacher) as expert:
            hidden_ITD = tower_hidden_state(vlm, pixels_ICHW)
            own_share = choice_share(routing(vlm))[:, expert].mean()
        passes.append(TeacherPass(patch_tokens(hidden_ITD, vlm.config.vision_config), own_share))
    return passes
