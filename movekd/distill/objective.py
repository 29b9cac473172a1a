"""The whole training loss: its terms, their weights, how each is normalised, what is logged.

    loss = text + kd_weight * kd + summary_weight * summary + balance_weight * balance
         + sum of weight * extra term

    term      mean over               from
    text      answer tokens           cross entropy of the language model
    kd        images with targets     `kd.kd_loss`, weighted over teachers
    summary   images with targets     `summary.summary_terms`, cosine of [CLS], mean over teachers
    balance   views                   `balance.balance_loss` of the routers
    extra     as registered           `register_loss_term`, `loss_terms:` in student.yaml

With experts per teacher (`student.mole.experts: per_teacher`) a teacher's KD loss is

    (1 - free_kd_share) * loss of a pass that may choose only its own expert and the shared ones
        + free_kd_share * loss of the pass that may choose all, which is that of the other terms

Each mean runs over one whole optimizer step: all ranks and all accumulation steps. A micro-batch
therefore returns sums (``LossTerm``), and ``step_loss`` divides them by the counts of the step.

Input: the student's forward pass (``StudentOutput``). Output: a scalar with gradient, and what to
log. ``train.model`` calls ``terms`` at the end of its forward pass; ``train.trainer`` calls
``count_units``, ``step_loss`` and ``LossLog``.

Legend: B samples, L text tokens, V views, I views with targets, N student tokens, M teacher
tokens, D channels, T teachers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from math import isqrt
from typing import Any, get_args

import torch
from torch import Tensor

from movekd.cache.grid import resize_attention
from movekd.distill.balance import BalanceKind, Routings, balance_loss, routing_statistics
from movekd.distill.config import DistillConfig, LossTermConfig
from movekd.distill.kd import effective_rank, kd_loss, token_statistics
from movekd.distill.loss_terms import (
    LossTerm,
    Statistic,
    StudentOutput,
    Terms,
    Unit,
    count_answer_tokens,
    extra_term,
)
from movekd.distill.summary import summary_terms
from movekd.distill.weighting import ANCHOR_SHARE, teacher_weights, token_weights
from movekd.distributed import mean_over_ranks, sum_over_ranks


@dataclass(frozen=True)
class Objective:
    """What a run minimises.

    Attributes:
        distill: the keys of the KD loss; None: no distillation.
        balance: form of the balance loss.
        balance_weight: weight of the balance loss.
        free_kd_share: share of the KD loss that is taken on the pass with all experts; below 1, the
            forward pass brings ``own_predictions``.
        extra_terms: keys of each registered term that the run uses, by name.
    """

    distill: DistillConfig | None = None
    balance: BalanceKind = "batch"
    balance_weight: float = 0.0
    free_kd_share: float = 1.0
    extra_terms: Mapping[str, LossTermConfig] = field(default_factory=dict)

    def terms(self, output: StudentOutput, *, measures_rank: bool = False) -> Terms:
        """Return the loss terms and statistics of a micro-batch.

        Their names depend only on the run: ranks with and without images log the same ones.

        Args:
            output: the forward pass.
            measures_rank: also measure ``token_rank``, which costs an SVD.
        """
        terms: Terms = []
        if output.text_output is not None:
            text_sum = output.text_output.loss + output.unused
            terms.append(LossTerm("text", text_sum, "answer_tokens", 1.0))
        if self.distill is not None:
            terms += kd_terms(self.distill, output, self.free_kd_share)
            if self.distill.summary_weight:
                terms += summary_terms(self.distill, output)
        if output.routings is not None:
            terms += self._balance_terms(output.routings, output.num_views)
        terms += [extra_term(name, keys, output) for name, keys in self.extra_terms.items()]
        tokens_VND = output.student_VND
        terms.append(Statistic("token_std", token_statistics(tokens_VND), output.num_images))
        if measures_rank:
            terms.append(Statistic("token_rank", effective_rank(tokens_VND), output.has_images))
        return terms

    def _balance_terms(self, routings: Routings, num_views: int) -> Terms:
        """Return the balance loss and how busy the experts were."""
        statistics = routing_statistics(routings)
        share_LE = mean_over_ranks(statistics.share_LE, num_views)  # the loss's F is of all ranks
        balance = balance_loss(routings, self.balance, share_LE=share_LE)
        return [
            LossTerm("balance", balance * num_views, "views", self.balance_weight),
            Statistic("routing_entropy", statistics.entropy_L.mean(), num_views),
            Statistic("routing_max_share", statistics.share_LE.max(), num_views),
            Statistic("routing_share", statistics.share_LE, num_views),
        ]


def kd_terms(distill: DistillConfig, output: StudentOutput, free_kd_share: float = 1.0) -> Terms:
    """Return the KD loss, then each teacher's loss before its weight, and the weights.

    With ``free_kd_share`` below 1, also the KD loss of the pass with all experts, and how many
    tokens chose their teacher's expert in the other passes.
    """
    num_images = len(output.student_IND) if output.targets is not None else 0
    if num_images:
        losses_IT, free_IT, weights_IT, entropy = _kd(distill, output, free_kd_share)
    else:  # the same names, with zeros
        losses_IT = free_IT = weights_IT = output.student_IND.new_zeros(
            (1, len(distill.teachers)), dtype=torch.float32
        )
        entropy = losses_IT.sum()
    kd_sum = (weights_IT * losses_IT).sum() + output.unused
    terms: Terms = [LossTerm("kd", kd_sum, "images", distill.kd_weight)]
    for at, name in enumerate(distill.teachers):
        terms.append(LossTerm(f"kd_{name}", losses_IT[:, at].sum().detach(), "images", None))
        weight = weights_IT[:, at].mean().detach()
        terms.append(Statistic(f"teacher_weight_{name}", weight, num_images))
    if free_kd_share < 1:
        free_sum = (weights_IT * free_IT).sum().detach()
        terms.append(LossTerm("free_kd", free_sum, "images", None))
        shares = output.own_shares or (entropy.detach(),) * len(distill.teachers)
        for name, share in zip(distill.teachers, shares, strict=True):
            terms.append(Statistic(f"own_expert_share_{name}", share, num_images))
    if distill.token_weighting != "none":
        terms.append(Statistic("token_weight_entropy", entropy, num_images))
    return terms


def _kd(
    distill: DistillConfig, output: StudentOutput, free_kd_share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the KD loss is made of.

    Losses (I, T); those of the pass with all experts (I, T), the same without further passes;
    teacher weights (I, T); and the mean entropy of the token weights.
    """
    assert output.targets is not None
    assert distill.token_weighting is not None
    assert distill.teacher_weighting is not None
    anchor, weights_IN = output.targets.get(distill.anchor), None
    entropy = torch.zeros((), device=output.student_IND.device)
    if distill.token_weighting != "none":
        assert anchor is not None  # checked when the run was set up, like its attention
        assert anchor.cls_attention_BHN is not None
        side = isqrt(output.student_IND.shape[1])
        attention_IHN = resize_attention(anchor.cls_attention_BHN, side)
        weights_IN = token_weights(
            attention_IHN, distill.token_weighting, blend=distill.token_blend
        )
        share_IN = weights_IN / weights_IN.sum(1, keepdim=True)
        entropy = torch.special.entr(share_IN).sum(1).mean()

    def losses(predictions: tuple[Tensor, ...]) -> Tensor:
        return kd_loss(  # before the teachers' weights, which may depend on them
            predictions,
            output.goals,
            entropy.new_ones(len(output.student_IND), len(distill.teachers)),
            weights_IN,
            combine="sum" if distill.token_weighting == "softmax" else "mean",
            form=distill.loss or "mse",
        ).per_teacher_BT

    losses_IT = free_IT = losses(output.predictions)
    if output.own_predictions:
        own_IT = losses(output.own_predictions)
        losses_IT = free_kd_share * free_IT + (1 - free_kd_share) * own_IT
    share = distill.anchor_share  # null where the weighting gives the anchor no fixed share
    weights_IT = teacher_weights(
        output.goals,
        distill.teacher_weighting,
        cls_BD=None if anchor is None else anchor.cls_BD,
        anchor=distill.teachers.index(distill.anchor) if anchor is not None else 0,
        anchor_share=ANCHOR_SHARE if share is None else share,
        losses_BT=losses_IT,
    )
    return losses_IT, free_IT, weights_IT, entropy


def count_units(batch: Mapping[str, Any]) -> Tensor:
    """Return how many units a collated batch holds, int64 (3,), in the order of ``Unit``."""
    labels, pixels = batch.get("labels"), batch["pixel_values"]
    num_tokens = 0 if labels is None else int(count_answer_tokens(labels))
    num_views = 0 if pixels is None else len(pixels)
    targets_at = batch.get("target_views")
    return torch.tensor(
        [num_tokens, num_views if targets_at is None else len(targets_at), num_views]
    )


def padding_statistic(batch: Mapping[str, Any]) -> Statistic:
    """Return the share of the positions of a collated batch that are padding."""
    attention_mask = batch["attention_mask"]
    return Statistic("padding_share", 1 - attention_mask.float().mean(), attention_mask.numel())


def step_loss(terms: Terms, counts: Tensor, world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a micro-batch's part of the step's loss, and each term's part before its weight.

    Args:
        terms: of the micro-batch.
        counts: ``count_units``, summed over the micro-batches and ranks of the step.
        world_size: number of ranks. DDP averages gradients over ranks, so a sum over ranks needs
            this factor.
    """
    count_of = dict(zip(get_args(Unit), counts.clamp(min=1), strict=True))
    loss, parts = torch.zeros((), device=counts.device), {}
    for term in terms:
        if isinstance(term, LossTerm):
            part = parts[term.name] = term.sum * world_size / count_of[term.unit]
            loss = loss if term.weight is None else loss + term.weight * part
    return loss, parts


class LossLog:
    """Collects what micro-batches log, until it is written.

    A part of the loss is averaged over the optimizer steps, a statistic over its weights.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, parts: Mapping[str, Tensor], terms: Terms) -> None:
        """Add a micro-batch: the parts of ``step_loss``, and the statistics among the terms."""
        found = {f"loss_{name}": part for name, part in parts.items()}
        for term in terms:
            if isinstance(term, Statistic):
                found[term.name] = term.value * term.weight
                self._weights[term.name] = self._weights.get(term.name, 0) + term.weight
        for name, value in found.items():
            self._sums[name] = value.detach().float().cpu() + self._sums.get(name, 0.0)

    def take(self, device: torch.device) -> dict[str, float]:
        """Return every mean over all ranks, and start again; every rank must call this."""
        names, sums, weights = [], [], []
        for name, total in sorted(self._sums.items()):
            for place in product(*map(range, total.shape)):
                names.append("_".join([name, *map(str, place)]))
                sums.append(total[place])
                weights.append(float(self._weights.get(name, self.num_steps)))
        both = torch.stack([torch.stack(sums), torch.tensor(weights)]).to(device)
        self._sums, self._weights, self.num_steps = {}, {}, 0
        found = zip(names, *sum_over_ranks(both).tolist(), strict=True)
        return {name: total / weight for name, total, weight in found if weight}


# Terms that ship with movekd: their functions stand in files of this folder, each with one
# `register_loss_term(...)` line here.
