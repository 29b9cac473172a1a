"""A sparse heavy-tailed teacher: squared errors explode in a few steps, a limited robust loss not.

Like the last layer of a CNN on real photographs: most channels are ordinary, some fire at one in
2,000 tokens, with values of Student's t distribution.
"""

import pytest
import torch
from torch import Tensor

from movekd.cache.stats import StatsAccumulator
from movekd.distill import kd_loss
from movekd.distill.token_loss import limit
from movekd.student.adapters import StudentHead
from movekd.train.step_losses import StepLosses

NUM_IMAGES, N, D, WIDTH = 512, 16, 48, 24
BATCH, STEPS = 16, 64


def features() -> tuple[Tensor, Tensor]:
    """Return the student's tokens, and standardised ones of the teacher that depend on them."""
    generator = torch.Generator().manual_seed(3)
    tokens_IND = torch.randn(NUM_IMAGES, N, WIDTH, generator=generator)
    mixing = torch.randn(WIDTH, D, generator=generator) / WIDTH**0.5
    teacher_IND = tokens_IND @ mixing
    rare = torch.rand(NUM_IMAGES, N, D // 3, generator=generator) < 1 / 2000
    normal = torch.randn(3, NUM_IMAGES, N, D // 3, generator=generator)
    student_t = normal[0] / (normal[1:].square().mean(0)).sqrt()  # of 2 degrees of freedom
    teacher_IND[..., : D // 3] = 1e-3 * torch.randn(
        NUM_IMAGES, N, D // 3, generator=generator
    ) + torch.where(rare, student_t, 0.0)
    calibration = StatsAccumulator()
    calibration.add(teacher_IND[:256])
    return tokens_IND, calibration.result().standardise(teacher_IND)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Two epochs of it are a run."""
    return features()


def max_over_median(data: tuple[Tensor, Tensor], form: str, clip: float) -> float:
    """Train a head, and return the figure that a run writes of its second half."""
    torch.manual_seed(0)
    head = StudentHead(WIDTH, D)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    losses = StepLosses(["cnn"], None, 0)
    for step in range(STEPS):
        at = slice(step * BATCH % NUM_IMAGES, step * BATCH % NUM_IMAGES + BATCH)
        prediction = head(data[0][at])
        goal = limit(data[1][at], clip)
        ones = torch.ones(BATCH, 1)
        loss = kd_loss([prediction], [goal], ones, combine="mean", form=form).total_B.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.add(step + 1, STEPS, {"kd_cnn": loss}, BATCH)
    losses.gather(1)
    return losses.figures(STEPS)["kd_loss_max_over_median_cnn"]


def test_the_teacher_is_as_sparse_and_heavy_as_a_real_one(data: tuple[Tensor, Tensor]) -> None:
    values = data[1].abs().flatten()
    assert values.max() > 100
    top = values.topk(len(values) // 1000).values
    assert top.square().sum() / values.square().sum() > 0.5


def test_squared_errors_explode_in_a_few_steps(data: tuple[Tensor, Tensor]) -> None:
    assert max_over_median(data, "mse", 0) > 2


@pytest.mark.parametrize("form", ["smooth_l1", "cosine+smooth_l1"])
def test_a_limited_robust_loss_does_not(data: tuple[Tensor, Tensor], form: str) -> None:
    assert 1 < max_over_median(data, form, 8) < 1.5
