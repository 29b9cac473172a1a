"""The global loss: predict each teacher's summary of an image, `distill.summary_weight`.

The KD loss compares patch tokens. kNN and zero-shot classification read one vector per image, so
that vector is a target as well. Teacher's side: its [CLS] as cached; without one, the mean of its
tokens. Student's side: a head on its [CLS]; in a tower without one, on the mean of its patches.
``objective`` adds the term, ``train.model`` computes the predictions.

Legend: I views with targets, N tokens, D channels, T teachers.
"""

from torch import Tensor
from torch.nn import functional as F

from movekd.cache.targets import TeacherTargets
from movekd.distill.config import DistillConfig
from movekd.distill.loss_terms import LossTerm, StudentOutput, Terms
from movekd.distill.target_tokens import decoded_tokens
from movekd.distill.token_loss import limit

SUMMARY = "summary"
"""Name of the term; per teacher ``summary_<teacher>``."""


def head_name(teacher: str) -> str:
    """Return the name of a teacher's summary head; no teacher can be called so."""
    return f"{SUMMARY}/{teacher}"


def summary_target(targets: TeacherTargets, distill: DistillConfig) -> Tensor:
    """Return a teacher's summary of each image, float32 (I, D).

    The mean of the tokens is taken of what `distill.targets` names, so that it is centred with
    ``standardised``.
    """
    cls_ID = targets.cls_BD
    if cls_ID is not None:
        return cls_ID
    return limit(decoded_tokens(targets, distill).mean(dim=1), distill.target_clip)


def summary_terms(distill: DistillConfig, output: StudentOutput) -> Terms:
    """Return the mean over teachers of 1 - cosine, summed over images, then each teacher's."""
    zero = output.student_IND.new_zeros(()).float()
    losses_T = [
        (1 - F.cosine_similarity(prediction_ID, goal_ID.float(), dim=1)).sum()
        for prediction_ID, goal_ID in zip(
            output.summary_predictions, output.summary_goals, strict=True
        )
    ] or [zero] * len(distill.teachers)
    total = sum(losses_T, zero) / len(losses_T)
    terms: Terms = [LossTerm(SUMMARY, total, "images", distill.summary_weight)]
    for name, loss in zip(distill.teachers, losses_T, strict=True):
        terms.append(LossTerm(f"{SUMMARY}_{name}", loss.detach(), "images", None))
    return terms
