"""Say what a term of the loss is, and register terms beside those of movekd.

Input: the student's forward pass (``StudentOutput``). Output: sums over a micro-batch
(``LossTerm``) and figures to log (``Statistic``). ``objective`` computes movekd's own terms, and
asks this module for those that `loss_terms:` of student.yaml names.

Legend: B samples, L text tokens, V views, I views with targets, N student tokens, D channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from movekd.cache.targets import TeacherTargets
from movekd.config import validate
from movekd.distill.balance import Routings
from movekd.distill.config import LossTermConfig
from movekd.errors import ConfigError, did_you_mean

IGNORED = -100
"""Label of a token that the text loss leaves out; PyTorch's ``ignore_index``."""

Unit = Literal["answer_tokens", "images", "views"]
"""What a term is the mean over."""


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
    routings: Routings | None = None
    """Per layer with experts, the router's (probabilities, choices) of the V views."""
    labels: Tensor | None = None
    """int64 (B, L), -100 where nothing is learned; None without a language model."""
    text_output: Any = None
    """The language model's output (logits, ...); its ``loss`` is the cross entropy, summed over
    the answer tokens. None without a language model."""
    has_images: bool = True
    unused: Tensor | float = 0.0
    """Zero, to be added to a loss: it gives parameters that this batch does not use a zero
    gradient, because DDP waits for one."""
    own_predictions: tuple[Tensor, ...] = ()
    """(I, N, D_t) per teacher, compared with ``goals``: from the tokens of a pass that may choose
    only the teacher's own expert and the shared ones. Empty without targets, and where no teacher
    has such a pass."""
    own_shares: tuple[Tensor, ...] = ()
    """Per teacher, the share of the tokens of that pass that chose its expert."""
    summary_predictions: tuple[Tensor, ...] = ()
    """(I, D_t) per teacher, float32; empty without targets or with `summary_weight: 0`."""
    summary_goals: tuple[Tensor, ...] = ()
    """(I, D_t) per teacher, compared with ``summary_predictions``."""

    @property
    def num_images(self) -> int:
        """Views with targets; without distillation, those that would have them."""
        return len(self.student_IND) if self.has_images else 0

    @property
    def num_views(self) -> int:
        """Views that the student saw."""
        return len(self.student_VND) if self.has_images else 0


# NamedTuples, not dataclasses: the model returns them, and accelerate looks for tensors only inside
# of tuples, lists and mappings.
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
    """A figure that is only logged, as its weighted mean since the last log."""

    name: str
    value: Tensor
    """No gradient. A matrix is logged as ``name_row_column``."""
    weight: float
    """Number of images or views that the value is of; without any it is not logged."""


Terms = list[LossTerm | Statistic]


def count_answer_tokens(labels: Tensor) -> Tensor:
    """Return the number of labels in the text loss (no token predicts the first one)."""
    return labels[:, 1:].ne(IGNORED).sum()


TermFunction = Callable[[StudentOutput, Any], Tensor]
"""(forward pass, keys of the term) -> its sum over the micro-batch: a scalar with gradient."""


class RegisteredTerm(NamedTuple):
    """A term that ``loss_terms:`` of student.yaml may name."""

    function: TermFunction
    unit: Unit
    config: type[LossTermConfig]
    needs_targets: bool


LOSS_TERMS: dict[str, RegisteredTerm] = {}


def register_loss_term(
    name: str,
    function: TermFunction,
    unit: Unit = "images",
    config: type[LossTermConfig] = LossTermConfig,
    *,
    needs_targets: bool = False,
) -> None:
    """Make a loss term known to student.yaml as ``loss_terms: {name: {weight: 0.1}}``.

    Register it before the config is loaded, in every process of a run.

    Args:
        name: its key; the log has it as ``loss_<name>``.
        function: returns the **sum** over the units of a micro-batch. It is only called for a
            micro-batch that holds such units.
        unit: what the sum is divided by, over the whole optimizer step.
        config: the keys of the term; a subclass of ``LossTermConfig`` adds some.
        needs_targets: the function reads predictions, goals or targets, which are empty with
            ``distill: null``; such a run is refused.

    Raises:
        ConfigError: the name is one of movekd's own, or another function has it.
    """
    if name in ("text", "kd", "free_kd", "balance") or name.startswith("kd_"):
        raise ConfigError(
            f"loss term '{name}' has a name that movekd logs itself; expected another than text, "
            "kd, kd_..., free_kd and balance. Register it under another name."
        )
    new = RegisteredTerm(function, unit, config, needs_targets)
    if LOSS_TERMS.setdefault(name, new).function is not function:
        raise ConfigError(
            f"loss term '{name}' is registered with another function already; expected one per "
            "name. Register it under another name."
        )


def read_loss_terms(
    content: Mapping[str, Mapping[str, Any]], *, has_targets: bool
) -> dict[str, LossTermConfig]:
    """Return the checked keys of `loss_terms`.

    Raises:
        ConfigError: no such term is registered, a key of it is wrong, or it needs targets and the
            run has none.
    """
    for name in content:
        if name not in LOSS_TERMS:
            known = ", ".join(sorted(LOSS_TERMS)) or "none"
            raise ConfigError(
                f"loss_terms names '{name}', and no such term is registered (registered: {known})."
                f"{did_you_mean(name, LOSS_TERMS)} A term from outside of movekd needs a script "
                "that registers it and trains (docs/training.md, Add a loss term); or take it out."
            )
        if LOSS_TERMS[name].needs_targets and not has_targets:
            raise ConfigError(
                f"loss_terms names '{name}', which needs the teachers' targets, and distill is "
                "null. Set distill, or take the term out."
            )
    return {
        name: validate(LOSS_TERMS[name].config, dict(keys), f"loss_terms.{name}")
        for name, keys in content.items()
    }


def extra_term(name: str, keys: LossTermConfig, output: StudentOutput) -> LossTerm:
    """Return a registered term of a micro-batch; zero if it holds no unit of the term.

    Raises:
        ConfigError: the term's function returned no scalar tensor.
    """
    function, unit = LOSS_TERMS[name][:2]
    has_units = output.has_images
    if unit == "answer_tokens":
        has_units = output.labels is not None and bool(count_answer_tokens(output.labels))
    total = output.student_VND.new_zeros((), dtype=torch.float32)
    if has_units:
        total = function(output, keys)
    if not isinstance(total, Tensor) or total.shape != ():
        found = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else repr(total)
        raise ConfigError(
            f"loss term '{name}' returned {found}; expected a scalar tensor, the sum over the "
            f"{unit} of the batch. Sum it in its function."
        )
    return LossTerm(name, total, unit, keys.weight)
