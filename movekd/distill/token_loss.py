"""The loss of one predicted token: squared error, or a form that outliers cannot dominate.

Input: predicted and target tokens. Output: a loss per token, which ``kd.kd_loss`` weights. Also the
limit on standardised targets. Real features are sparse and heavy-tailed: a channel that rarely
fires has a tiny standard deviation, and its few values then hold most of the squared error.

Dimensions: B batch, N tokens, D channels.
"""

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from movekd.errors import ConfigError, did_you_mean

LossForm = Literal["mse", "smooth_l1", "cosine+smooth_l1"]

COSINE_SHARE = 0.9
"""Weight of the cosine in ``cosine+smooth_l1``; smooth L1 has the rest."""


def token_loss(prediction_BND: Tensor, target_BND: Tensor, form: LossForm) -> Tensor:
    """Return the loss of each token, float32 (B, N), also under autocast.

    - ``mse``: mean over channels of the squared error.
    - ``smooth_l1``: mean over channels of e^2 / 2 for |e| < 1, |e| - 1/2 above.
    - ``cosine+smooth_l1``: 0.9 (1 - cosine) + 0.1 smooth L1.

    Raises:
        ConfigError: an unknown form.

    Source: Theia (arXiv 2407.20179) and its code (bdaiinstitute/theia, ``main_loss: cos_l1``) for
    the third; AM-RADIO (arXiv 2312.06709) has the same weights.
    """
    prediction_BND, target_BND = prediction_BND.float(), target_BND.float()
    if form == "mse":
        return (prediction_BND - target_BND).square().mean(dim=2)
    if form not in get_args(LossForm):
        raise ConfigError(
            f"unknown form of the KD loss {form!r}; expected one of "
            f"{', '.join(get_args(LossForm))}.{did_you_mean(form, get_args(LossForm))}"
        )
    smooth_BN = F.smooth_l1_loss(prediction_BND, target_BND, reduction="none").mean(dim=2)
    if form == "smooth_l1":
        return smooth_BN
    cosine_BN = F.cosine_similarity(prediction_BND, target_BND, dim=2)
    return COSINE_SHARE * (1 - cosine_BN) + (1 - COSINE_SHARE) * smooth_BN


def limit(tokens: Tensor, sigmas: float | None) -> Tensor:
    """Return standardised tokens with every value within +- ``sigmas``; 0 or None: as they are."""
    return tokens.clamp(-sigmas, sigmas) if sigmas else tokens
