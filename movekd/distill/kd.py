"""The distillation (KD) loss, and the statistics that show a collapse of the student's tokens.

Input: predicted and target tokens per teacher, with the weights of ``weighting``. Output: the loss
of each sample, which ``objective`` sums and normalises.

Dimensions: B batch, N patch tokens, D channels (may differ between teachers), T teachers.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from movekd.distill.token_loss import LossForm, token_loss
from movekd.errors import ConfigError

Combine = Literal["mean", "sum"]


class KDTerms(NamedTuple):
    """Distillation losses of a batch, float32; samples without targets are zero.

    Attributes:
        total_B: sum over teachers of weight times loss.
        per_teacher_BT: the losses before the teachers' weights.
    """

    total_B: Tensor
    per_teacher_BT: Tensor


def kd_loss(
    predictions_BND: Sequence[Tensor],
    targets_BND: Sequence[Tensor],
    teacher_weights_BT: Tensor,
    token_weights_BN: Tensor | None = None,
    *,
    combine: Combine,
    form: LossForm = "mse",
) -> KDTerms:
    """Return the distillation loss of each sample, for the caller to average.

    With l_t[n] = ``token_loss`` of teacher t at token n, in float32 even under autocast:

    - ``combine="mean"`` (revised): L_t = mean_n w[n] l_t[n], for weights of mean 1.
    - ``combine="sum"`` (official): L_t = mean_n l_t[n] + sum_n w[n] l_t[n], for weights that sum
      to 1.

    Both are mean_n l_t[n] without token weights. The total is sum_t weight_t L_t.

    Args:
        predictions_BND: (B, N, D_t) per teacher. Official: the student's tokens, T times.
        targets_BND: (B, N, D_t) per teacher. Official: the adapted teacher tokens.
        teacher_weights_BT: From ``teacher_weights``.
        token_weights_BN: From ``token_weights``; None: all tokens count the same.
        combine: How to combine the tokens: ``mean`` or ``sum``.
        form: Form of the loss per token.

    Raises:
        ConfigError: an unknown ``combine`` or ``form``, or tensors that do not fit each other.

    Source: MoVE-KD (arXiv 2501.01709) for ``"sum"``.
    """
    if combine not in ("mean", "sum"):
        raise ConfigError(
            f"unknown way to combine tokens {combine!r}; expected 'mean' (weights of mean 1) or "
            "'sum' (weights that sum to 1). Set one of the two."
        )
    _check_shapes(predictions_BND, targets_BND, teacher_weights_BT, token_weights_BN)
    losses_B = []
    for prediction_BND, target_BND in zip(predictions_BND, targets_BND, strict=True):
        error_BN = token_loss(prediction_BND, target_BND, form)
        if token_weights_BN is None:
            losses_B.append(error_BN.mean(dim=1))
        elif combine == "mean":
            losses_B.append((token_weights_BN * error_BN).mean(dim=1))
        else:
            losses_B.append(error_BN.mean(dim=1) + (token_weights_BN * error_BN).sum(dim=1))
    per_teacher_BT = torch.stack(losses_B, dim=1)
    return KDTerms((teacher_weights_BT * per_teacher_BT).sum(dim=1), per_teacher_BT)


def token_statistics(student_BND: Tensor) -> Tensor:
    """Return the spread of the student's tokens as a scalar, float32, without gradient.

    The mean over channels of the standard deviation over all tokens of the batch. A distillation
    loss that falls while this falls is collapse, not learning: log them side by side.
    """
    tokens_XD = student_BND.detach().float().flatten(0, -2)
    return tokens_XD.std(dim=0, correction=0).mean()


def effective_rank(tokens_BND: Tensor, max_tokens: int = 1024) -> Tensor:
    """Return how many directions the tokens really use as a scalar, float32, without gradient.

    exp(entropy of p), with p the singular values of the centred tokens over their sum: 1 if all
    lie on one line, D if all directions are equally strong. Tokens can keep their standard
    deviation and lose their rank: they have collapsed, too.

    Args:
        tokens_BND: any tokens, the last dimension their channels.
        max_tokens: measure at most this many tokens, evenly spaced. It bounds the result.

    NaN where a token is not finite.

    Source: Roy & Vetterli, The effective rank (EUSIPCO 2007).
    """
    tokens_XD = tokens_BND.detach().flatten(0, -2)
    stride = -(-len(tokens_XD) // max_tokens)
    sample_XD = tokens_XD[::stride].float()
    if not sample_XD.isfinite().all():  # the loss check reports it; svdvals would raise
        return sample_XD.new_tensor(float("nan"))
    values_R = torch.linalg.svdvals(sample_XD - sample_XD.mean(dim=0))
    smallest = torch.finfo(values_R.dtype).tiny
    share_R = values_R / values_R.sum().clamp_min(smallest)
    rank: Tensor = torch.special.entr(share_R).sum().exp()
    return rank


def _check_shapes(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    teacher_weights_BT: Tensor,
    token_weights_BN: Tensor | None,
) -> None:
    """Refuse tensors that would broadcast instead of matching."""
    if not len(predictions) == len(targets) == teacher_weights_BT.shape[-1] > 0:
        raise ConfigError(
            f"{len(predictions)} predictions, {len(targets)} targets and weights of "
            f"{teacher_weights_BT.shape[-1]} teachers; expected one of each per teacher, and at "
            "least one teacher. Pass them in the same order."
        )
    for at, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        expected = {"target": (prediction.shape, target.shape)}
        if token_weights_BN is not None:
            expected["token weights"] = (prediction.shape[:2], token_weights_BN.shape)
        expected["teacher weights"] = (prediction.shape[:1], teacher_weights_BT.shape[:1])
        for what, (wanted, found) in expected.items():
            if wanted != found:
                raise ConfigError(
                    f"teacher {at}: its prediction is {tuple(prediction.shape)} and the {what} "
                    f"are {tuple(found)}; expected {tuple(wanted)}. Bring both to the student's "
                    "grid first."
                )
