"""Find out whether a few batches dominate the KD loss of a teacher.

Input: the parts of the loss, micro-batch by micro-batch. Output: per teacher, the largest loss of a
step over the median of all, in the second half of the run; `log.json` has it at the end as
``kd_loss_max_over_median_<teacher>``. Above 2, outliers of that teacher's features decide what is
learned. `logging_steps` does not matter: the steps are kept here, and in ``trainer_state.json`` of
a checkpoint, so that a resumed run ends with the figures of an uninterrupted one.

Legend: T teachers.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from movekd.distributed import sum_over_ranks

MAX_OVER_MEDIAN = "kd_loss_max_over_median_"
"""Prefix of the figures' names in the log, before the teacher's."""
STATE_KEY = "movekd_step_losses"
"""Name among the ``stateful_callbacks`` of a checkpoint."""


class _Stored(BaseModel):
    """What a checkpoint keeps."""

    teachers: list[str]
    since: int
    """First step that was looked at."""
    steps: list[int]
    losses: list[list[float]]
    """One loss per teacher, for each of ``steps``."""


class StepLosses:
    """The losses of the steps after the middle of a run.

    Args:
        teachers: those of the run, in order; empty without distillation.
        stored: what a checkpoint holds of ``state``. None, or anything else: the steps until now
            are unknown.
        global_step: steps done before this process started.
    """

    def __init__(self, teachers: Sequence[str], stored: Any, global_step: int) -> None:
        self._teachers = list(teachers)
        self._pending: dict[int, Tensor] = {}  # this rank's part, (T,) per step
        self._losses: dict[int, list[float]] = {}
        self._since = global_step + 1
        known = _read(stored)
        if known is not None and known.teachers == self._teachers:
            self._since = known.since
            self._losses = dict(zip(known.steps, known.losses, strict=False))

    def add(self, step: int, max_steps: int, parts: Mapping[str, Tensor], num_images: int) -> None:
        """Add a micro-batch.

        Args:
            step: number of the step, from 1.
            max_steps: steps of the whole run.
            parts: those of ``step_loss``.
            num_images: images with targets in the whole step, over all ranks. A step without any
                has no KD loss, and is left out.
        """
        if self._teachers and num_images and step > max_steps // 2:
            part_T = torch.stack([parts[f"kd_{name}"].detach() for name in self._teachers])
            self._pending[step] = self._pending.get(step, 0) + part_T

    def gather(self, world_size: int) -> None:
        """Sum up what the ranks added since the last call; every rank must call this."""
        if self._pending:
            parts_ST = torch.stack(list(self._pending.values()))
            losses = (sum_over_ranks(parts_ST) / world_size).tolist()
            self._losses.update(zip(self._pending, losses, strict=True))
            self._pending = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON can hold it; ``gather`` comes first."""
        return {
            "teachers": self._teachers,
            "since": self._since,
            "steps": list(self._losses),
            "losses": list(self._losses.values()),
        }

    def figures(self, max_steps: int) -> dict[str, float]:
        """Return the figure of each teacher; ``gather`` comes first.

        It is empty if steps of the second half are unknown (a resume from an older version's
        checkpoint), or if none has a KD loss. A teacher whose median is zero is left out.
        """
        losses = [loss_T for step, loss_T in self._losses.items() if step > max_steps // 2]
        if self._since > max_steps // 2 + 1 or not losses:
            return {}
        return {
            f"{MAX_OVER_MEDIAN}{name}": max(values) / median(values)
            for name, values in zip(self._teachers, zip(*losses, strict=True), strict=True)
            if median(values) > 0
        }


def _read(stored: Any) -> _Stored | None:
    try:
        return _Stored.model_validate(stored)
    except ValidationError:
        return None
