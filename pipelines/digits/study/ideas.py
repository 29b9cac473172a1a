"""Two ideas of the field as loss terms of the study: movekd itself has neither.

``import study.ideas`` registers them. An arm names one under ``loss_terms``; if it wins, it moves
into movekd.

Legend: I images with targets, N student tokens, D channels, T teachers.
"""

from math import isqrt

import torch
from torch import Tensor

from movekd.cache.grid import resize_attention
from movekd.distill import LossTermConfig, StudentOutput, register_loss_term
from movekd.distill.kd import kd_loss
from movekd.distill.weighting import token_relations, token_weights

ANCHOR = "clip"


def without_best_teacher(output: StudentOutput, keys: LossTermConfig) -> Tensor:
    """Return the KD loss of all teachers but the one with the smallest loss in this batch.

    The sum over images of the mean over the other teachers, with the revised recipe's token weights
    and squared error. It stands in place of the KD loss (``distill.kd_weight: 0``).

    Source: the simplest form of teacher dropping in UNIC (arXiv 2408.05088), which draws which
    teachers it drops.
    """
    assert output.targets is not None
    attention = output.targets[ANCHOR].cls_attention_BHN
    assert attention is not None
    side = isqrt(output.student_IND.shape[1])
    weights_IN = token_weights(resize_attention(attention, side), "blend")
    equal_IT = weights_IN.new_ones(len(weights_IN), len(output.goals))
    found = kd_loss(output.predictions, output.goals, equal_IT, weights_IN, combine="mean")
    losses_T = found.per_teacher_BT.sum(dim=0)
    places_T = torch.arange(len(losses_T), device=losses_T.device)
    return losses_T[places_T != losses_T.argmin()].mean()


def relations(output: StudentOutput, keys: LossTermConfig) -> Tensor:
    """Return 1 - linear CKA of the student's tokens and a teacher's, over the tokens of an image.

    Summed over images, mean over teachers. It compares how similar the tokens of an image are to
    each other, so it needs no head.

    Source: Kornblith et al. (arXiv 1905.00414) for CKA.
    """
    student_IX = token_relations(output.student_IND)
    alike = [(student_IX * token_relations(goal_IND)).sum(dim=1) for goal_IND in output.goals]
    return (1 - torch.stack(alike)).mean(dim=0).sum()


for name, term in (("without_best_teacher", without_best_teacher), ("relations", relations)):
    register_loss_term(name, term, needs_targets=True)
