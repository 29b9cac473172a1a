"""The losses of multi-teacher distillation, as pure functions on tensors.

Features of teachers, tokens of the student and records of the routers come in; scalars and
per-sample vectors go out. Nothing here reads a file or a config, or knows what a teacher is. Used
by the trainer; every name below is also meant for outsiders.
"""

from movekd.distill.balance import (
    RoutingStatistics,
    balance_loss,
    choice_share,
    routing_statistics,
)
from movekd.distill.loss import KDTerms, effective_rank, kd_loss, token_statistics
from movekd.distill.sam_layout import released_sam_tokens
from movekd.distill.weighting import teacher_weights, token_weights

__all__ = [
    "KDTerms",
    "RoutingStatistics",
    "balance_loss",
    "choice_share",
    "effective_rank",
    "kd_loss",
    "released_sam_tokens",
    "routing_statistics",
    "teacher_weights",
    "token_statistics",
    "token_weights",
]
