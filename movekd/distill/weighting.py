"""Token and teacher weights for the KD loss.

Input: the anchor's [CLS] attention and [CLS] embedding, and teacher tokens. Output: a weight for
each token and for each teacher, which ``kd.kd_loss`` takes. All arithmetic is float32.

Dimensions: B batch, H heads, N patch tokens, D channels, T teachers, O = T - 1 teachers other
than the anchor.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from movekd.errors import ConfigError, did_you_mean

TokenWeighting = Literal["softmax", "blend", "none"]
TeacherWeighting = Literal["anchor", "anchor_equal", "equal", "similarity", "balanced"]

ANCHOR_SHARE = 0.8
"""Weight of the anchor in the released scripts (`--kd_memory_w`)."""

FLATTEN_ABOVE = 0.8
"""Official recipe: a mean similarity weight above this is flattened by a second softmax."""


def token_weights(
    cls_attention_BHN: Tensor, kind: TokenWeighting, *, blend: float = 0.5, cap: float = 4.0
) -> Tensor:
    """Return a float32 weight (B, N) for every patch token, without gradient.

    With a the mean over heads of the attention row of [CLS]:

    - ``softmax`` (official): softmax(a). **Sums** to 1 over the tokens, and is nearly uniform
      because a is a softmax already. Goes with ``kd_loss(combine="sum")``.
    - ``blend`` (revised): (1 - blend) + blend * min(N a / sum a, cap), renormalised to **mean** 1,
      so that attention sinks cannot dominate the loss. Goes with ``kd_loss(combine="mean")``.
    - ``none``: ones. Goes with ``kd_loss(combine="mean")``; for the official sum pass no weights.

    Args:
        cls_attention_BHN: Attention of [CLS] to the patches, not negative, its own column dropped.
        kind: ``softmax``, ``blend`` or ``none``.
        blend: Share of the attention in ``blend``, 0 to 1.
        cap: Largest multiple of the mean attention that ``blend`` lets a token have.

    Raises:
        ConfigError: an unknown kind.

    Source: MoVE-KD (arXiv 2501.01709), attention-guided regularisation, for ``softmax``.
    """
    _check_kind(kind, get_args(TokenWeighting), "token weighting")
    attention_BN = cls_attention_BHN.detach().float().mean(dim=1)
    if kind == "none":
        return torch.ones_like(attention_BN)
    if kind == "softmax":
        return attention_BN.softmax(dim=1)
    smallest = torch.finfo(attention_BN.dtype).tiny
    relative_BN = attention_BN / attention_BN.mean(dim=1, keepdim=True).clamp_min(smallest)
    blended_BN = (1 - blend) + blend * relative_BN.clamp(max=cap)
    return blended_BN / blended_BN.mean(dim=1, keepdim=True).clamp_min(smallest)


def teacher_weights(
    tokens_BND: Sequence[Tensor],
    kind: TeacherWeighting,
    *,
    cls_BD: Tensor | None = None,
    anchor: int = 0,
    anchor_share: float = ANCHOR_SHARE,
    losses_BT: Tensor | None = None,
) -> Tensor:
    """Return a float32 weight (B, T) for every teacher; the weights of a sample sum to 1.

    - ``anchor`` (official): the anchor gets ``anchor_share``, the others share the rest by
      ``softmax_t(u_t)``, ``u_t = mean_n <c, adapted_t[n]>``, with c the anchor's [CLS] embedding.
      Gradient flows into the adapted tokens. Where the mean over the batch of softmax(u) has a
      maximum above 0.8, softmax is applied a second time to the whole batch, which flattens it.
    - ``anchor_equal``: the anchor gets ``anchor_share``, the others equal parts of the rest.
    - ``equal``: every teacher gets 1 / T.
    - ``similarity``: a teacher whose tokens are similar to the anchor's counts more:
      k_t / sum_s k_s per sample, with k_t the linear CKA between the teacher's tokens and the
      anchor's (1 for the anchor itself). CKA compares the similarity of token pairs, so widths may
      differ and no adapter is needed: made for ``adapters: student``. No gradient.
    - ``balanced``: a teacher with a small loss counts more:
      (1 / L_t) / sum_s (1 / L_s), with L_t the mean of ``losses_BT`` over the batch. No gradient.
      That is the direction of the gradient of sum_t log L_t, i.e. uncertainty weighting with
      every variance at its optimum.

    A single teacher gets 1.

    Args:
        tokens_BND: One tensor per teacher, in the order of the result: the adapted tokens
            (``anchor``), the targets on one grid (``similarity``). The others need only the batch
            size and the device.
        kind: One of the above.
        cls_BD: The anchor's [CLS] embedding; needed by ``anchor``.
        anchor: Position of the anchor.
        anchor_share: Weight of the anchor.
        losses_BT: Each teacher's loss before its weight; needed by ``balanced``.

    Raises:
        ConfigError: an unknown kind, ``anchor`` without ``cls_BD``, ``similarity`` with tokens on
            several grids, or ``balanced`` without losses.

    Source: MoVE-KD (arXiv 2501.01709) and its released code for ``anchor``; Kornblith et al.
    (arXiv 1905.00414) for CKA; Kendall et al. (arXiv 1705.07115) for uncertainty weighting.
    """
    _check_kind(kind, get_args(TeacherWeighting), "teacher weighting")
    num_teachers, device = len(tokens_BND), tokens_BND[0].device
    batch = tokens_BND[0].shape[0]
    if kind == "equal" or num_teachers == 1:
        return torch.full((batch, num_teachers), 1 / num_teachers, device=device)
    if kind == "similarity":
        return _alike(tokens_BND, anchor)
    if kind == "balanced":
        return _balanced(losses_BT)
    if kind == "anchor_equal":
        shares_BO = torch.full((batch, num_teachers - 1), 1 / (num_teachers - 1), device=device)
    else:
        if cls_BD is None:
            raise ConfigError(
                "teacher weighting 'anchor' was asked for without the anchor's [CLS] embedding; "
                "expected cls_BD. Use a cache whose anchor stores cls: true, or 'anchor_equal'."
            )
        others = [tokens for at, tokens in enumerate(tokens_BND) if at != anchor % num_teachers]
        shares_BO = _similarity_shares(others, cls_BD)
    rest_BO = (1 - anchor_share) * shares_BO
    anchor_B1 = torch.full((batch, 1), anchor_share, device=device)
    at = anchor % num_teachers
    return torch.cat([rest_BO[:, :at], anchor_B1, rest_BO[:, at:]], dim=1)


def _similarity_shares(others_BND: Sequence[Tensor], cls_BD: Tensor) -> Tensor:
    """Return softmax_t(mean_n <c, adapted_t[n]>) as (B, O), flattened where it is one-sided."""
    # The mean over tokens and the inner product commute: O (B, D) tensors instead of (B, N, D).
    means_BOD = torch.stack([tokens.float().mean(dim=1) for tokens in others_BND], dim=1)
    cls_B1D = cls_BD.float().unsqueeze(1)
    # A product and a sum rather than a matmul, which autocast would run in half precision.
    shares_BO = (means_BOD * cls_B1D).sum(dim=-1).softmax(dim=1)
    return torch.where(
        shares_BO.mean(dim=0).max() > FLATTEN_ABOVE, shares_BO.softmax(dim=1), shares_BO
    )


def token_relations(tokens_BND: Tensor) -> Tensor:
    """Return the centred products of all token pairs, float32 (B, N * N), of length 1 per sample.

    The inner product of two of them is linear CKA. Source: Kornblith et al. (arXiv 1905.00414).
    """
    tokens_BND = tokens_BND.float()
    tokens_BND = tokens_BND - tokens_BND.mean(dim=1, keepdim=True)
    with torch.autocast(tokens_BND.device.type, enabled=False):
        gram_BX = (tokens_BND @ tokens_BND.mT).flatten(1)
    return torch.nn.functional.normalize(gram_BX, dim=1)


def _alike(tokens_BND: Sequence[Tensor], anchor: int) -> Tensor:
    """Return each teacher's linear CKA with the anchor, over their sum, (B, T)."""
    sizes = [tokens.shape[1] for tokens in tokens_BND]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"teacher weighting 'similarity' was asked for with tokens of {sizes} places; expected "
            "as many of every teacher. Set distill.grid: student."
        )
    grams = [token_relations(tokens.detach()) for tokens in tokens_BND]
    alike_BT = torch.stack([(gram * grams[anchor]).sum(dim=1) for gram in grams], dim=1)
    alike_BT = alike_BT.clamp_min(torch.finfo(alike_BT.dtype).eps)  # teachers without any contrast
    return alike_BT / alike_BT.sum(dim=1, keepdim=True)


def _balanced(losses_BT: Tensor | None) -> Tensor:
    """Return the inverse of each teacher's mean loss, over their sum, (B, T)."""
    if losses_BT is None:
        raise ConfigError(
            "teacher weighting 'balanced' was asked for without losses; expected losses_BT, "
            "the per_teacher_BT of kd_loss."
        )
    mean_T = losses_BT.detach().float().mean(dim=0)
    inverse_T = 1 / mean_T.clamp_min(torch.finfo(mean_T.dtype).eps)
    return (inverse_T / inverse_T.sum()).expand_as(losses_BT)


def _check_kind(kind: str, known: Sequence[str], what: str) -> None:
    if kind not in known:
        raise ConfigError(
            f"unknown {what} {kind!r}; expected one of {', '.join(known)}."
            f"{did_you_mean(kind, known)}"
        )
