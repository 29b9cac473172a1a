"""Divide an optimizer's parameter groups by the parts of the student, each with its learning rate.

Input: the optimizer that transformers' Trainer made, with one group that decays and one that does
not, and the rates of `learning_rates`. Output: the same optimizer, with two more groups per part
that has a rate. A scheduler multiplies the rate of every group by the same curve. Used by
``trainer``.

Trainer decides what decays: neither biases nor the weights of norms. Everything else does, also
parameters with one dimension that are neither (``image_newline``, a [CLS] embedding, layer scales)
and the matrices of experts, routers and LoRA.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from movekd.errors import ConfigError
from movekd.student.checkpoint import part_of

HEADS = "heads"
"""Name in `learning_rates` of the teacher adapters and student heads."""


def group_part(name: str) -> str:
    """Return the key of `learning_rates` that a parameter of a ``DistillModel`` belongs to."""
    return HEADS if name.startswith("adapters.") else part_of(name)


def divide_groups(
    optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], rates: Mapping[str, float]
) -> None:
    """Move the parameters of each part in ``rates`` into groups with that learning rate.

    The groups that the optimizer has stay first, with what is left in them. For each part follows
    one group per old group, with its weight decay; a new group holds its part as ``name``. Empty
    groups are left out: a checkpoint of FSDP2 does not bring them back.

    Args:
        optimizer: before its first step, and before it has a scheduler.
        named: names and parameters of a ``DistillModel``.
        rates: part -> learning rate.

    Raises:
        ConfigError: the optimizer holds no parameter of a part, because it keeps them elsewhere.

    Source: haotian-liu/LLaVA llava/train/llava_trainer.py, create_optimizer (``mm_projector_lr``).
    """
    part_by_id = {id(parameter): group_part(name) for name, parameter in named}
    groups: list[dict[str, Any]] = list(optimizer.param_groups)
    divided: list[dict[str, Any]] = []
    for part, rate in rates.items():
        moved = [[p for p in group["params"] if part_by_id.get(id(p)) == part] for group in groups]
        if not any(moved):
            raise ConfigError(
                f"learning_rates.{part} is {rate:g}, but {type(optimizer).__name__} holds no "
                f"parameter of {part} in its groups. Take another training.optim, such as "
                "adamw_torch, or leave learning_rates out."
            )
        for group, params in zip(groups, moved, strict=True):
            divided.append(group | {"params": params, "lr": rate, "name": part})
    for group in groups:
        group["params"] = [p for p in group["params"] if part_by_id.get(id(p)) not in rates]
    optimizer.param_groups[:] = [group for group in groups + divided if group["params"]]


class RateLog(TrainerCallback):
    """Remembers the rates of the last optimizer step; Trainer logs only that of the first group."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._has_others = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the rates: the step is done, and the scheduler has not moved yet."""
        groups = kwargs["optimizer"].param_groups
        self._has_others = "name" not in groups[0]
        self._rates = {
            f"learning_rate_{group['name']}": float(group["lr"])
            for group in groups
            if "name" in group
        }

    def add_to(self, logs: dict[str, float]) -> None:
        """Log ``learning_rate_<part>``; ``learning_rate`` stays if other parts learn at it."""
        logs |= self._rates
        if not self._has_others:
            logs.pop("learning_rate", None)
