"""What the distillation losses of both recipes pull a student towards: the gradient at its tokens.

Comes in: a teacher's features as a loss takes them, exact or out of the cache. Goes out: the
gradient of ``distill.kd_loss`` with respect to the student's tokens. ``analysis.fidelity`` compares
the two; an error of the codec that does not turn this gradient costs a training nothing.

The student is not a network but its tokens: normal numbers of variance 1, the scale that
standardised features have, drawn anew for each image by its key. Its head (revised) and the
teacher's adapter (official) are those of a training at its first step, from a fixed seed.

Two students are looked at:

- ``untrained``: as drawn. The residual is as large as the target, so small errors vanish in it.
- ``near``: what is compared with the target is the exact target plus noise of 10% of its norm, a
  token each. The residual is small, as after training, and the codec's error weighs most.

Legend: B batch, N student tokens, M native teacher tokens, S student width, T teacher width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from movekd.distill import kd_loss, token_weights
from movekd.seeding import seeded
from movekd.student.adapters import StudentHead, TeacherAdapter

StudentState = Literal["untrained", "near"]
NEAR = 0.1
"""Norm of the residual of a student that is ``near``, over the norm of the target."""


@dataclass(frozen=True)
class LossTargets:
    """One teacher's features of a batch as the losses take them, float32 on one device.

    Attributes:
        standardised_BNT: standardised by the cache's channel statistics, on the student's grid.
        raw_BMT: in the teacher's units on the native grid; None where a cache is on another.
        attention_BHN: [CLS] attention on the student's grid, None without.
    """

    standardised_BNT: Tensor
    raw_BMT: Tensor | None
    attention_BHN: Tensor | None


class KDGradient:
    """A seeded student and what stands between it and one teacher.

    Args:
        num_tokens: N, of the student.
        student_width: S.
        teacher_tokens: M.
        teacher_width: T.
        seed: of everything drawn.
        device: where the gradients are taken.
    """

    def __init__(
        self,
        num_tokens: int,
        student_width: int,
        teacher_tokens: int,
        teacher_width: int,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self._num_tokens, self._student_width = num_tokens, student_width
        self._seed, self._device = seed, device
        with seeded(seed):
            head = StudentHead(student_width, teacher_width)
            adapter = TeacherAdapter(teacher_width, teacher_tokens, student_width, num_tokens)
        self._head = head.to(device).requires_grad_(False)
        self._adapter = adapter.to(device).requires_grad_(False)

    def revised(
        self, keys: Sequence[str], targets: LossTargets, exact: LossTargets, at: StudentState
    ) -> Tensor:
        """Return the gradient (B, N, S) of the revised recipe's loss from ``targets``.

        A head predicts the standardised targets; tokens are weighed by the blend of the teacher's
        own attention. For ``near``, the prediction has the value of exact target plus noise, and
        keeps the head's derivative.

        Args:
            keys: of the images; they seed the student.
            targets: what the loss compares with.
            exact: what ``near`` is near to.
            at: which of the two students.
        """
        student_BNS = self._draw(keys, self._student_width, "student").requires_grad_()
        prediction_BNT = self._head(student_BNS)
        if at == "near":
            value_BNT = self._beside(keys, exact.standardised_BNT)
            prediction_BNT = prediction_BNT + (value_BNT - prediction_BNT).detach()
        weights_BN = None
        if targets.attention_BHN is not None:
            weights_BN = token_weights(targets.attention_BHN, "blend")
        alone_B1 = torch.ones(len(keys), 1, device=self._device)
        terms = kd_loss(
            [prediction_BNT], [targets.standardised_BNT], alone_B1, weights_BN, combine="mean"
        )
        return torch.autograd.grad(terms.total_B.sum(), student_BNS)[0]

    def official(
        self, keys: Sequence[str], targets: LossTargets, exact: LossTargets, at: StudentState
    ) -> Tensor:
        """Return the gradient (B, N, S) of the official recipe's loss from ``targets``.

        The teacher's raw tokens go through its adapter and are compared with the student's; tokens
        are weighed by the softmax of the teacher's own attention. (A training gives the anchor no
        adapter; here it has one too, so that its width need not be the student's.)

        Args:
            keys: of the images; they seed the student.
            targets: what the loss compares with, on the native grid.
            exact: what ``near`` is near to, on the native grid.
            at: which of the two students.
        """
        assert targets.raw_BMT is not None
        assert exact.raw_BMT is not None
        if at == "near":
            student_BNS = self._beside(keys, self._adapter(exact.raw_BMT))
        else:
            student_BNS = self._draw(keys, self._student_width, "student")
        student_BNS.requires_grad_()
        weights_BN = None
        if targets.attention_BHN is not None:
            weights_BN = token_weights(targets.attention_BHN, "softmax")
        alone_B1 = torch.ones(len(keys), 1, device=self._device)
        adapted_BNS = self._adapter(targets.raw_BMT)
        terms = kd_loss([student_BNS], [adapted_BNS], alone_B1, weights_BN, combine="sum")
        return torch.autograd.grad(terms.total_B.sum(), student_BNS)[0]

    def all(
        self, keys: Sequence[str], targets: LossTargets, exact: LossTargets
    ) -> dict[str, Tensor]:
        """Return ``recipe_student`` -> gradient, for both students and every recipe there is."""
        found = {}
        for at in get_args(StudentState):
            found[f"revised_{at}"] = self.revised(keys, targets, exact, at)
            if targets.raw_BMT is not None:
                found[f"official_{at}"] = self.official(keys, targets, exact, at)
        return found

    def _draw(self, keys: Sequence[str], width: int, what: str) -> Tensor:
        """Return normal numbers (B, N, width), the same for a key whatever its batch."""
        drawn = []
        for key in keys:
            text = f"{self._seed} {what} {key}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randn(self._num_tokens, width, generator=generator))
        return torch.stack(drawn).to(self._device)

    def _beside(self, keys: Sequence[str], target_BND: Tensor) -> Tensor:
        """Return the target plus noise of ``NEAR`` times its norm, a token each."""
        noise_BND = self._draw(keys, target_BND.shape[-1], "noise")
        norm_BN1 = target_BND.norm(dim=-1, keepdim=True)
        direction_BND = noise_BND / noise_BND.norm(dim=-1, keepdim=True)
        beside_BND: Tensor = target_BND + NEAR * norm_BN1 * direction_BND
        return beside_BND
