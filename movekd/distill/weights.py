"""Which tokens and which teachers count how much.

The anchor's [CLS] attention comes in and a weight a token goes out; teacher tokens and the
anchor's [CLS] embedding come in and a weight a teacher goes out. Both go to ``loss.kd_loss``.
Everything is computed in float32.

Dimensions: B batch, H heads, N patch tokens, D channels, T teachers, O = T - 1 teachers other
than the anchor.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from movekd.errors import ConfigError, did_you_mean

TokenWeighting = Literal["softmax", "blend", "none"]
TeacherWeighting = Literal["anchor", "anchor_equal", "equal"]

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
      so that attention sinks cannot own the loss. Goes with ``kd_loss(combine="mean")``.
    - ``none``: ones. Goes with ``kd_loss(combine="mean")``; for the official sum pass no weights.

    Args:
        cls_attention_BHN: Attention of [CLS] to the patches, not negative, its own column dropped.
        kind: One of the three.
        blend: Share of the attention in ``blend``, 0..1.
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
    anchor_share: float = 0.8,
    has_targets_B: Tensor | None = None,
) -> Tensor:
    """Return a float32 weight (B, T) for every teacher; the weights of a sample sum to 1.

    - ``anchor`` (official): the anchor gets ``anchor_share``, the others share the rest by
      softmax_t(u_t), u_t = mean_n <c, adapted_t[n]>, with c the anchor's [CLS] embedding.
      Gradient flows into the adapted tokens. Where the mean over the batch of softmax(u) has a
      maximum above 0.8, softmax is applied a second time to the whole batch, which flattens it.
    - ``anchor_equal``: the anchor gets ``anchor_share``, the others equal parts of the rest.
    - ``equal``: every teacher gets 1 / T.

    A lone anchor gets 1.

    Args:
        tokens_BND: One tensor a teacher, in the order of the result: the adapted tokens. Only
            ``anchor`` looks into them (the anchor's own are not used); the others need the batch
            size and the device.
        kind: One of the three.
        cls_BD: The anchor's [CLS] embedding; needed by ``anchor``.
        anchor: Position of the anchor.
        anchor_share: Weight of the anchor.
        has_targets_B: bool; samples without targets stay out of the mean over the batch, and
            what they hold is not looked at.

    Raises:
        ConfigError: an unknown kind, or ``anchor`` without ``cls_BD``.

    Source: MoVE-KD (arXiv 2501.01709) and its released code for ``anchor``.
    """
    _check_kind(kind, get_args(TeacherWeighting), "teacher weighting")
    num_teachers, device = len(tokens_BND), tokens_BND[0].device
    batch = tokens_BND[0].shape[0]
    if kind == "equal" or num_teachers == 1:
        return torch.full((batch, num_teachers), 1 / num_teachers, device=device)
    if kind == "anchor_equal":
        shares_BO = torch.full((batch, num_teachers - 1), 1 / (num_teachers - 1), device=device)
    else:
        if cls_BD is None:
            raise ConfigError(
                "teacher weighting 'anchor' was asked for without the anchor's [CLS] embedding; "
                "expected cls_BD. Use a cache whose anchor stores cls: true, or 'anchor_equal'."
            )
        others = [tokens for at, tokens in enumerate(tokens_BND) if at != anchor % num_teachers]
        shares_BO = _similarity_shares(others, cls_BD, has_targets_B)
    rest_BO = (1 - anchor_share) * shares_BO
    anchor_B1 = torch.full((batch, 1), anchor_share, device=device)
    at = anchor % num_teachers
    return torch.cat([rest_BO[:, :at], anchor_B1, rest_BO[:, at:]], dim=1)


def _similarity_shares(
    others_BND: Sequence[Tensor], cls_BD: Tensor, has_targets_B: Tensor | None
) -> Tensor:
    """Return softmax_t(mean_n <c, adapted_t[n]>) as (B, O), flattened where it is one-sided."""
    # The mean over tokens and the inner product commute: O (B, D) tensors instead of (B, N, D).
    means_BOD = torch.stack([tokens.float().mean(dim=1) for tokens in others_BND], dim=1)
    cls_B1D = cls_BD.float().unsqueeze(1)
    held_B1 = torch.ones_like(cls_B1D[..., 0], dtype=torch.bool)
    if has_targets_B is not None:
        held_B1 = has_targets_B.unsqueeze(1)
        means_BOD = means_BOD.masked_fill(~held_B1.unsqueeze(2), 0.0)
        cls_B1D = cls_B1D.masked_fill(~held_B1.unsqueeze(2), 0.0)
    # A product and a sum rather than a matmul, which autocast would run in half precision.
    shares_BO = (means_BOD * cls_B1D).sum(dim=-1).softmax(dim=1)
    mean_O = (shares_BO * held_B1).sum(dim=0) / held_B1.sum().clamp(min=1)
    return torch.where(mean_O.max() > FLATTEN_ABOVE, shares_BO.softmax(dim=1), shares_BO)


def _check_kind(kind: str, known: Sequence[str], what: str) -> None:
    """Refuse a kind that is not known.

    Raises:
        ConfigError: with the nearest right one.
    """
    if kind not in known:
        raise ConfigError(
            f"unknown {what} {kind!r}; expected one of {', '.join(known)}."
            f"{did_you_mean(kind, known)}"
        )
