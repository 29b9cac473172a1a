"""Compute the gradient of the distillation losses of both recipes at a student's tokens.

Input: a teacher's features as the loss gets them, exact or decoded. Output: the gradient of
``distill.kd_loss`` with respect to the student's tokens. ``analysis.fidelity`` compares the two
gradients. A codec error that does not change the gradient does not affect training.

The student is not a network, only tokens: normal numbers of variance 1, the scale of standardised
features, seeded by the key of each image. The student's head (revised) and the teacher's adapter
(official) are initialised as in training, from a fixed seed.

Two states of the student:

- ``untrained``: as drawn. The residual is as large as the target, so small errors have no effect.
- ``near``: the prediction is the exact target plus noise of 10% of its norm per token. The residual
  is small, as after training, so the codec's error matters most.

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
"""Norm of the residual of the ``near`` student, relative to the norm of the target."""


@dataclass(frozen=True)
class LossTargets:
    """One teacher's features of a batch as the losses get them, float32 on one device.

    Attributes:
        standardised_BNT: standardised by the cache's channel statistics, on the student's grid.
        raw_BMT: in the teacher's units on the native grid; None if the cache has another grid.
        attention_BHN: [CLS] attention on the student's grid, None if the spec stores none.
    """

    standardised_BNT: Tensor
    raw_BMT: Tensor | None
    attention_BHN: Tensor | None


class KDGradient:
    """A seeded student with the head and adapter for one teacher.

    Args:
        num_tokens: N.
        student_width: S.
        teacher_tokens: M.
        teacher_width: T.
        seed: seed of all random numbers.
        device: where the gradients are computed.
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

        A head predicts the standardised targets. The blend of the teacher's attention weights the
        tokens. For ``near``, the value of the prediction is the exact target plus noise; its
        derivative is that of the head.

        Args:
            keys: keys of the images, which seed the student.
            targets: targets of the loss.
            exact: exact targets, for ``near``.
            at: state of the student.
        """
        student_BNS = self._draw(keys, self._student_width, "student").requires_grad_()
        prediction_BNT = self._head(student_BNS)
        if at == "near":
            value_BNT = self._near(keys, exact.standardised_BNT)
            prediction_BNT = prediction_BNT + (value_BNT - prediction_BNT).detach()
        weights_BN = None
        if targets.attention_BHN is not None:
            weights_BN = token_weights(targets.attention_BHN, "blend")
        weight_B1 = torch.ones(len(keys), 1, device=self._device)
        terms = kd_loss(
            [prediction_BNT], [targets.standardised_BNT], weight_B1, weights_BN, combine="mean"
        )
        return torch.autograd.grad(terms.total_B.sum(), student_BNS)[0]

    def official(
        self, keys: Sequence[str], targets: LossTargets, exact: LossTargets, at: StudentState
    ) -> Tensor:
        """Return the gradient (B, N, S) of the official recipe's loss from ``targets``.

        The loss compares the student's tokens with the teacher's raw tokens after its adapter. The
        softmax of the teacher's attention weights the tokens. (In training the anchor has no
        adapter. Here it has one, so that its width may differ from the student's.)

        Arguments as in ``revised``; both targets are on the native grid.
        """
        assert targets.raw_BMT is not None
        assert exact.raw_BMT is not None
        if at == "near":
            student_BNS = self._near(keys, self._adapter(exact.raw_BMT))
        else:
            student_BNS = self._draw(keys, self._student_width, "student")
        student_BNS.requires_grad_()
        weights_BN = None
        if targets.attention_BHN is not None:
            weights_BN = token_weights(targets.attention_BHN, "softmax")
        weight_B1 = torch.ones(len(keys), 1, device=self._device)
        adapted_BNS = self._adapter(targets.raw_BMT)
        terms = kd_loss([student_BNS], [adapted_BNS], weight_B1, weights_BN, combine="sum")
        return torch.autograd.grad(terms.total_B.sum(), student_BNS)[0]

    def all(
        self, keys: Sequence[str], targets: LossTargets, exact: LossTargets
    ) -> dict[str, Tensor]:
        """Return ``recipe_state`` -> gradient, for both states and every recipe that applies."""
        found = {}
        for at in get_args(StudentState):
            found[f"revised_{at}"] = self.revised(keys, targets, exact, at)
            if targets.raw_BMT is not None:
                found[f"official_{at}"] = self.official(keys, targets, exact, at)
        return found

    def _draw(self, keys: Sequence[str], width: int, name: str) -> Tensor:
        """Return normal numbers (B, N, width) that depend only on the keys, not on the batch."""
        drawn = []
        for key in keys:
            text = f"{self._seed} {name} {key}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randn(self._num_tokens, width, generator=generator))
        return torch.stack(drawn).to(self._device)

    def _near(self, keys: Sequence[str], target_BND: Tensor) -> Tensor:
        """Return the target plus noise of ``NEAR`` times the norm of each token."""
        noise_BND = self._draw(keys, target_BND.shape[-1], "noise")
        norm_BN1 = target_BND.norm(dim=-1, keepdim=True)
        direction_BND = noise_BND / noise_BND.norm(dim=-1, keepdim=True)
        near_BND: Tensor = target_BND + NEAR * norm_BN1 * direction_BND
        return near_BND
