"""The losses of multi-teacher distillation, as functions on tensors.

Input: teacher features, student tokens and the routers' records. Output: losses and what to log.
Nothing here reads a file. ``objective`` holds the whole training loss; the names below are also
for outsiders.
"""

import movekd.distill.objective  # noqa: F401  (registers the terms that ship with movekd)
from movekd.distill.balance import (
    RoutingStatistics,
    balance_loss,
    choice_share,
    routing_statistics,
)
from movekd.distill.config import LossTermConfig
from movekd.distill.kd import KDTerms, effective_rank, kd_loss, token_statistics
from movekd.distill.loss_terms import StudentOutput, register_loss_term
from movekd.distill.sam_layout import released_sam_tokens
from movekd.distill.token_loss import token_loss
from movekd.distill.weighting import teacher_weights, token_weights

__all__ = [
    "KDTerms",
    "LossTermConfig",
    "RoutingStatistics",
    "StudentOutput",
    "balance_loss",
    "choice_share",
    "effective_rank",
    "kd_loss",
    "register_loss_term",
    "released_sam_tokens",
    "routing_statistics",
    "teacher_weights",
    "token_loss",
    "token_statistics",
    "token_weights",
]
