"""The whole training loss: its terms, their weights, how each is normalised, what is logged.

    loss = text + kd_weight * kd + balance_weight * balance + sum of weight * extra term

    term      mean over               from
    text      answer tokens           cross entropy of the language model
    kd        images with targets     `kd.kd_loss`, weighted over teachers
    balance   views                   `balance.balance_loss` of the routers
    extra     as registered           `register_loss_term`, `loss_terms:` in student.yaml

Each mean runs over one whole optimizer step: all ranks and all accumulation steps. A micro-batch
therefore returns sums (``LossTerm``), and ``step_loss`` divides them by the counts of the step.

Input: the student's forward pass (``StudentOutput``). Output: a scalar with gradient, and what to
log. ``train.model`` makes the first; ``train.trainer`` calls ``terms``, ``step_loss`` and
``LossLog``.

Legend: B samples, L text tokens, V views, I views with targets, N student tokens, M teacher
tokens, D channels, T teachers, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import isqrt
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from movekd.cache.grid import resize_attention, resize_tokens
from movekd.cache.targets import TeacherTargets
from movekd.config import validate
from movekd.distill.balance import BalanceKind, Routings, balance_loss, routing_statistics
from movekd.distill.config import DistillConfig, LossTermConfig
from movekd.distill.kd import effective_rank, kd_loss, token_statistics
from movekd.distill.sam_layout import released_sam_tokens
from movekd.distill.weighting import ANCHOR_SHARE, teacher_weights, token_weights
from movekd.distributed import mean_over_ranks, sum_over_ranks
from movekd.errors import ConfigError, did_you_mean

IGNORED = -100
"""Label of a token that the text loss leaves out; PyTorch's ``ignore_index``."""

Unit = Literal["answer_tokens", "images", "views"]
"""What a term is the mean over."""


# NamedTuples and not dataclasses: FSDP2 and accelerate look for tensors inside of tuples, but not
# of dataclasses.
class StudentOutput(NamedTuple):
    """One forward pass of the student, as the objective needs it."""

    student_VND: Tensor
    """The student's tokens of every view; a black image's where the batch has no image."""
    student_IND: Tensor
    """Its tokens of the views with targets."""
    predictions: tuple[Tensor, ...] = ()
    """(I, N, D_t) per teacher, float32; empty without targets."""
    goals: tuple[Tensor, ...] = ()
    """(I, N, D_t) per teacher, compared with ``predictions``."""
    targets: Mapping[str, TeacherTargets] | None = None
    """The cached features of the I views, by teacher; None without targets."""
    routings: Routings = ()
    """Per layer with experts, the router's (probabilities, choices) of the V views."""
    labels: Tensor | None = None
    """int64 (B, L), -100 where nothing is learned; None without a language model."""
    text_sum: Tensor | None = None
    """Cross entropy, summed over the answer tokens; None without a language model."""
    text_output: Any = None
    """The language model's output (logits, ...); only in a run with extra terms."""
    has_images: bool = True
    unused: Tensor | float = 0.0
    """Zero. Its gradient is zero for parameters that this batch does not use, where DDP needs
    one."""

    @property
    def num_images(self) -> int:
        """Views with targets; without distillation, those that would have them."""
        return len(self.student_IND) if self.has_images else 0

    @property
    def num_views(self) -> int:
        """Views that the student saw."""
        return len(self.student_VND) if self.has_images else 0


class LossTerm(NamedTuple):
    """One part of the loss, of one micro-batch; logged as ``loss_<name>``."""

    name: str
    sum: Tensor
    """Scalar, float32, with gradient."""
    unit: Unit
    """What ``sum`` is summed over."""
    weight: float | None
    """Weight in the loss; None: only logged."""


class Statistic(NamedTuple):
    """A figure that is only logged: all sums since the last log over all denominators."""

    name: str
    sum: Tensor
    """No gradient. A matrix is logged as ``name_row_column``."""
    denominator: float
    """Mostly a number of images or views; what has none is not logged."""


class Terms(NamedTuple):
    """All that a micro-batch adds to the loss and to the log."""

    losses: list[LossTerm]
    statistics: list[Statistic]
    unused: Tensor | float = 0.0
    """Of ``StudentOutput``: zero, but the loss must depend on it."""


@dataclass(frozen=True)
class Objective:
    """What a run minimises.

    Attributes:
        distill: the keys of the KD loss; None: no distillation.
        balance: form of the balance loss.
        balance_weight: weight of the balance loss.
        extra_terms: keys of each registered term that the run uses, by name.
    """

    distill: DistillConfig | None = None
    balance: BalanceKind = "batch"
    balance_weight: float = 0.0
    extra_terms: Mapping[str, LossTermConfig] = field(default_factory=dict)

    def terms(self, output: StudentOutput, *, measures_rank: bool = False) -> Terms:
        """Return the terms and statistics of a micro-batch.

        Their names depend on the run only: ranks with and without images log the same ones.

        Args:
            output: the forward pass.
            measures_rank: also measure ``token_rank``, which costs an SVD.
        """
        num_images = output.num_images
        token_std = token_statistics(output.student_VND) * num_images
        terms = Terms([], [Statistic("token_std", token_std, num_images)], output.unused)
        if measures_rank:
            count = int(output.has_images)
            rank = effective_rank(output.student_VND) * count
            terms.statistics.append(Statistic("token_rank", rank, count))
        if output.text_sum is not None:
            terms.losses.append(LossTerm("text", output.text_sum, "answer_tokens", 1.0))
        parts = []
        if self.distill is not None:
            parts.append(kd_terms(self.distill, output))
        if output.routings:
            parts.append(self._balance_terms(output))
        for part in parts:
            terms.losses.extend(part.losses)
            terms.statistics.extend(part.statistics)
        terms.losses.extend(_extra_term(n, keys, output) for n, keys in self.extra_terms.items())
        return terms

    def _balance_terms(self, output: StudentOutput) -> Terms:
        """Return the balance loss and how busy the experts were; zeros without images."""
        statistics, num_views = routing_statistics(output.routings), output.num_views
        share_LE = mean_over_ranks(statistics.share_LE, num_views)  # the loss's F is of all ranks
        balance = balance_loss(output.routings, self.balance, share_LE=share_LE)
        logged = {
            "routing_entropy": statistics.entropy_L.mean(),
            "routing_max_share": statistics.share_LE.max(),
            "routing_share": statistics.share_LE,
        }
        return Terms(
            [LossTerm("balance", balance * num_views, "views", self.balance_weight)],
            [Statistic(name, value * num_views, num_views) for name, value in logged.items()],
        )


def target_tokens(targets: TeacherTargets, name: str, distill: DistillConfig, side: int) -> Tensor:
    """Return what the student learns from a teacher, (I, M, D): decoded, ordered, resized."""
    if distill.targets == "standardised":
        tokens_IMD = targets.standardised_BND
    else:
        tokens_IMD = targets.scaled_BND if distill.targets == "scaled" else targets.tokens_BND
    if distill.sam_layout == "released" and name == "sam":
        tokens_IMD = released_sam_tokens(tokens_IMD)
    return resize_tokens(tokens_IMD, side) if distill.grid == "student" else tokens_IMD


def kd_terms(distill: DistillConfig, output: StudentOutput) -> Terms:
    """Return the KD loss, each teacher's loss before its weight, and the weights."""
    if output.targets is None:
        zero = output.student_IND.new_zeros((), dtype=torch.float32)
        zero_T = zero.expand(len(distill.teachers))
        return _kd_record(distill, 0, zero, zero_T, zero_T, zero)
    anchor = output.targets.get(distill.anchor)
    weights_IN = _token_weights(distill, anchor, side=isqrt(output.student_IND.shape[1]))
    num_images, device = len(output.goals[0]), output.goals[0].device
    losses_IT = kd_loss(  # before the teachers' weights, which may depend on them
        output.predictions,
        output.goals,
        torch.ones(num_images, len(distill.teachers), device=device),
        weights_IN,
        combine="sum" if distill.token_weighting == "softmax" else "mean",
    ).per_teacher_BT
    assert distill.teacher_weighting is not None
    share = distill.anchor_share  # null where the weighting gives the anchor no fixed share
    weights_IT = teacher_weights(
        output.goals,
        distill.teacher_weighting,
        cls_BD=None if anchor is None else anchor.cls_BD,
        anchor=distill.teachers.index(distill.anchor) if anchor is not None else 0,
        anchor_share=ANCHOR_SHARE if share is None else share,
        losses_BT=losses_IT,
    )
    entropy = torch.zeros((), device=device)
    if weights_IN is not None:
        share_IN = weights_IN / weights_IN.sum(1, keepdim=True)
        entropy = torch.special.entr(share_IN).sum(1).mean()
    kd = (weights_IT * losses_IT).sum()
    return _kd_record(distill, num_images, kd, losses_IT.sum(0), weights_IT.mean(0), entropy)


def _kd_record(
    distill: DistillConfig,
    num_images: int,
    kd: Tensor,
    losses_T: Tensor,
    weights_T: Tensor,
    entropy: Tensor,
) -> Terms:
    """Return the record of a KD loss: sums of losses, means of weights and of their entropy."""
    terms = Terms([LossTerm("kd", kd, "images", distill.kd_weight)], [])
    for name, loss, weight in zip(distill.teachers, losses_T, weights_T, strict=True):
        terms.losses.append(LossTerm(f"kd_{name}", loss.detach(), "images", None))
        sum_of_weights = weight.detach() * num_images
        terms.statistics.append(Statistic(f"teacher_weight_{name}", sum_of_weights, num_images))
    if distill.token_weighting != "none":
        statistic = Statistic("token_weight_entropy", entropy * num_images, num_images)
        terms.statistics.append(statistic)
    return terms


def _token_weights(
    distill: DistillConfig, anchor: TeacherTargets | None, side: int
) -> Tensor | None:
    """Return the weight of each of the student's tokens (I, N); None where all count the same."""
    if distill.token_weighting in (None, "none") or anchor is None:
        return None
    attention_IHM = anchor.cls_attention_BHN
    assert attention_IHM is not None  # checked when the run was set up
    attention_IHN = resize_attention(attention_IHM, side)
    return token_weights(attention_IHN, distill.token_weighting, blend=distill.token_blend)


# Normalisation ------------------------------------------------------------------------------------


def count_units(batch: Mapping[str, Any]) -> Tensor:
    """Return how many units a collated batch holds, int64 (3,), in the order of ``Unit``."""
    labels, pixels = batch.get("labels"), batch["pixel_values"]
    num_tokens = 0 if labels is None else int(count_answer_tokens(labels))
    num_views = 0 if pixels is None else len(pixels)
    targets_at = batch.get("target_views")
    return torch.tensor(
        [num_tokens, num_views if targets_at is None else len(targets_at), num_views]
    )


def count_answer_tokens(labels: Tensor) -> Tensor:
    """Return the number of labels in the text loss (no token predicts the first one)."""
    return labels[:, 1:].ne(IGNORED).sum()


def step_loss(terms: Terms, counts: Tensor, world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a micro-batch's part of the step's loss, and each term's part before its weight.

    Args:
        terms: of the micro-batch.
        counts: ``count_units``, summed over the micro-batches and ranks of the step.
        world_size: number of ranks. DDP averages gradients over ranks, so a sum over ranks needs
            this factor.
    """
    count_of = dict(zip(get_args(Unit), counts.clamp(min=1), strict=True))
    parts = {term.name: term.sum * world_size / count_of[term.unit] for term in terms.losses}
    loss = torch.zeros((), device=counts.device) + terms.unused
    for term in terms.losses:
        if term.weight is not None:
            loss = loss + term.weight * parts[term.name]
    return loss, parts


class LossLog:
    """Adds up what micro-batches log, until it is written.

    A term's part is averaged over the optimizer steps, a statistic over its own count.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._sums: dict[str, Tensor] = {}
        self._denominators: dict[str, float] = {}

    def add(self, parts: Mapping[str, Tensor], statistics: Sequence[Statistic]) -> None:
        """Add a micro-batch: the parts of ``step_loss`` and the statistics."""
        for name, part in parts.items():
            self._add(f"loss_{name}", part)
        for name, total, denominator in statistics:
            self._add(name, total)
            self._denominators[name] = self._denominators.get(name, 0) + denominator

    def _add(self, name: str, value: Tensor) -> None:
        added = value.detach().float().cpu()
        self._sums[name] = self._sums[name] + added if name in self._sums else added

    def take(self, device: torch.device) -> dict[str, float]:
        """Return every mean over all ranks, and start again; every rank must call this.

        A statistic without a count, as of images in steps of text, is left out.
        """
        names, sums, counts = [], [], []
        for name, total in sorted(self._sums.items()):
            for place in product(*map(range, total.shape)):
                names.append("_".join([name, *map(str, place)]))
                sums.append(total[place])
                counts.append(float(self._denominators.get(name, self.num_steps)))
        both = torch.stack([torch.stack(sums), torch.tensor(counts)]).to(device)
        self._sums, self._denominators, self.num_steps = {}, {}, 0
        found = zip(names, *sum_over_ranks(both).tolist(), strict=True)
        return {name: total / count for name, total, count in found if count}


# Extra terms --------------------------------------------------------------------------------------

TermFunction = Callable[[StudentOutput, Any], Tensor]
"""(forward pass, keys of the term) -> its sum over the micro-batch: a scalar with gradient."""


class RegisteredTerm(NamedTuple):
    """A term that ``loss_terms:`` of student.yaml may name."""

    function: TermFunction
    unit: Unit
    config: type[LossTermConfig]


LOSS_TERMS: dict[str, RegisteredTerm] = {}


def register_loss_term(
    name: str,
    function: TermFunction,
    unit: Unit = "images",
    config: type[LossTermConfig] = LossTermConfig,
) -> None:
    """Make a loss term known to student.yaml as ``loss_terms: {name: {weight: 0.1}}``.

    Register it before the config is loaded, in every process of a run.

    Args:
        name: its key; the log has it as ``loss_<name>``.
        function: returns the **sum** over the units of a micro-batch. It is only called for a
            micro-batch that holds such units.
        unit: what the sum is divided by, over the whole optimizer step.
        config: the keys of the term; a subclass of ``LossTermConfig`` adds some.

    Raises:
        ConfigError: the name is one of movekd's own.
    """
    if name in ("text", "kd", "balance") or name.startswith("kd_"):
        raise ConfigError(
            f"loss term '{name}' has a name that movekd logs itself; expected another than text, "
            "kd, kd_... and balance. Register it under another name."
        )
    LOSS_TERMS[name] = RegisteredTerm(function, unit, config)


def read_loss_terms(content: Mapping[str, Mapping[str, Any]]) -> dict[str, LossTermConfig]:
    """Return the checked keys of `loss_terms`.

    Raises:
        ConfigError: no such term is registered, or a key of it is wrong.
    """
    for name in content:
        if name not in LOSS_TERMS:
            known = ", ".join(sorted(LOSS_TERMS)) or "none"
            raise ConfigError(
                f"loss_terms names '{name}', and no such term is registered (registered: {known})."
                f"{did_you_mean(name, LOSS_TERMS)} Call movekd.distill.register_loss_term before "
                "the config is loaded, or take it out."
            )
    return {
        name: validate(LOSS_TERMS[name].config, dict(keys), f"loss_terms.{name}")
        for name, keys in content.items()
    }


def _extra_term(name: str, keys: LossTermConfig, output: StudentOutput) -> LossTerm:
    term = LOSS_TERMS[name]
    if term.unit == "answer_tokens":
        has_units = output.labels is not None and bool(count_answer_tokens(output.labels))
    else:
        has_units = output.has_images
    if not has_units:
        zero = output.student_VND.new_zeros((), dtype=torch.float32)
        return LossTerm(name, zero, term.unit, keys.weight)
    value = term.function(output, keys)
    if not isinstance(value, Tensor) or value.shape != ():
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise ConfigError(
            f"loss term '{name}' returned {found}; expected a scalar tensor, the sum over the "
            f"{term.unit} of the batch. Sum it in its function."
        )
    return LossTerm(name, value, term.unit, keys.weight)
