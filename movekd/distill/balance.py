"""The balance loss, which keeps the experts equally busy, and how busy they are.

Input: one routing per layer, in depth order: the router's probabilities and its one-hot choices
(``student.routing(model)``, or any such pairs). Output: a scalar, or the experts' shares. Used by
``objective``.

Dimensions: L layers with experts, B batch, N tokens with [CLS], E experts.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from movekd.errors import ConfigError

BalanceKind = Literal["batch", "sample"]
Routings = Sequence[tuple[Tensor, Tensor]]
"""One (probabilities_BNE, choice_BNE) per layer; B, N and E are the same in all."""


class RoutingStatistics(NamedTuple):
    """What the routers of a batch did, for logs.

    Attributes:
        share_LE: float32, share of the tokens that each expert of each layer got.
        entropy_L: float32, entropy of these shares over log E: 1 if all are equally busy, 0 if
            one expert gets every token.
    """

    share_LE: Tensor
    entropy_L: Tensor


def balance_loss(
    routings: Routings, kind: BalanceKind, *, share_LE: Tensor | None = None
) -> Tensor:
    """Return the balance loss of a batch as a scalar, float32, with gradient to the routers.

    P_i is the mean probability of expert i, F_i the share of hard choices that fell on it.

    - ``sample`` (official): mean over samples of sum_i P_i F_i, with P and F of one sample over
      all its layers and tokens. 1 / E when uniform.
    - ``batch`` (revised): E sum_i P_i F_i, with P and F of one layer over all samples and tokens,
      averaged over the layers. 1 when uniform, E when collapsed. Each layer counts by itself,
      because two layers that collapsed onto different experts look balanced when pooled.

    Args:
        routings: One per layer.
        kind: ``sample`` or ``batch``.
        share_LE: F of ``batch`` over all ranks, i.e. the all-reduced mean of
            ``choice_share(routings)``; None: this rank's F. F carries no gradient, so
            the average of the ranks' losses and gradients is exactly that of the whole batch, if
            all ranks hold equally many tokens.

    Raises:
        ConfigError: an unknown kind, or no layer.

    Source: MoVE-KD's released code for ``sample``.
    """
    if not routings:
        raise ConfigError(
            "no layer with experts was given to the balance loss; expected at least one. Add a "
            "MoLE to the student, or set the weight of the balance loss to 0."
        )
    probabilities_LBNE = torch.stack([probabilities for probabilities, _ in routings]).float()
    if kind == "sample":
        choice_LBNE = torch.stack([choice for _, choice in routings]).float()
        products_BE = probabilities_LBNE.mean(dim=(0, 2)) * choice_LBNE.mean(dim=(0, 2))
        return products_BE.sum(dim=1).mean()
    if kind == "batch":
        mean_LE = probabilities_LBNE.mean(dim=(1, 2))
        share_LE = choice_share(routings) if share_LE is None else share_LE
        return mean_LE.shape[1] * (mean_LE * share_LE).sum(dim=1).mean()
    raise ConfigError(
        f"unknown balance loss {kind!r}; expected 'sample' (official) or 'batch' (revised). Set "
        "one of the two."
    )


def choice_share(routings: Routings) -> Tensor:
    """Return the share of tokens that each expert of each layer got, (L, E) float32."""
    return torch.stack([choice.detach().float().mean(dim=(0, 1)) for _, choice in routings])


def routing_statistics(routings: Routings) -> RoutingStatistics:
    """Return how busy the experts of each layer were, without gradient."""
    share_LE = choice_share(routings)
    entropy_L = torch.special.entr(share_LE).sum(dim=1)
    return RoutingStatistics(share_LE, entropy_L / math.log(max(share_LE.shape[1], 2)))
