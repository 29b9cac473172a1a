"""Loss terms of the study, against another formula and against movekd's own KD loss."""

import numpy as np
import pytest
import torch

from movekd.cache.codecs import codec
from movekd.cache.stats import ChannelStats
from movekd.cache.targets import TeacherTargets
from movekd.distill import LossTermConfig, StudentOutput
from movekd.distill.config import DistillConfig, fill_distill
from movekd.distill.objective import kd_terms
from movekd.train.recipes import RECIPES
from study.ideas import ANCHOR, relations, without_best_teacher

IMAGES, TOKENS, WIDTHS = 3, 16, (8, 6, 5)
NAMES = (ANCHOR, "eva", "sam")
KEYS = LossTermConfig(weight=1.0)


@pytest.fixture
def output():
    """A forward pass whose teacher 1 is fitted best, teacher 2 worst."""
    torch.manual_seed(0)
    goals = tuple(torch.randn(IMAGES, TOKENS, width) for width in WIDTHS)
    errors = (0.5, 0.1, 2.0)
    predictions = tuple(
        (goal + error * torch.randn_like(goal)).requires_grad_()
        for goal, error in zip(goals, errors, strict=True)
    )
    stored = [{"tokens": goal.half()} for goal in goals]
    stored[0]["cls_attention"] = torch.rand(IMAGES, 2, TOKENS).softmax(-1)
    targets = {
        name: TeacherTargets(arrays, ChannelStats(torch.zeros(w), torch.ones(w)), codec("float16"))
        for name, arrays, w in zip(NAMES, stored, WIDTHS, strict=True)
    }
    student = torch.randn(IMAGES, TOKENS, 7, requires_grad=True)
    return StudentOutput(student, student, predictions, goals, targets)


def cka(first, second):
    """Linear CKA by its definition: HSIC of centred kernels over their geometric mean."""
    centre = np.eye(TOKENS) - 1 / TOKENS
    kernels = [centre @ (x @ x.T) @ centre for x in (first, second)]
    hsic = [np.trace(a @ b) for a in kernels for b in kernels]
    return hsic[1] / np.sqrt(hsic[0] * hsic[3])


def test_relations_are_cka(output):
    found = relations(output, KEYS)
    student = output.student_IND.detach().double().numpy()
    wanted = [
        np.mean([1 - cka(student[at], goal[at].double().numpy()) for goal in output.goals])
        for at in range(IMAGES)
    ]
    assert found.item() == pytest.approx(sum(wanted), rel=1e-5)
    found.backward()
    assert output.student_IND.grad.abs().sum() > 0
    turned = torch.linalg.qr(torch.randn(WIDTHS[0], WIDTHS[0])).Q
    like_clip = output._replace(
        student_IND=3 * output.goals[0] @ turned + 1, goals=output.goals[:1]
    )
    assert relations(like_clip, KEYS).item() == pytest.approx(0, abs=1e-4)


def test_the_best_fitted_teacher_is_left_out(output):
    distill = DistillConfig(teachers=list(NAMES), anchor=ANCHOR)
    terms = kd_terms(fill_distill(distill, RECIPES["revised_2026_11"]["distill"]), output)
    losses = {term.name: term.sum.item() for term in terms if term.name.startswith("kd_")}
    assert min(losses, key=losses.get) == "kd_eva"
    found = without_best_teacher(output, KEYS)
    assert found.item() == pytest.approx((losses["kd_clip"] + losses["kd_sam"]) / 2, rel=1e-5)
    found.backward()
    assert output.predictions[1].grad is None or not output.predictions[1].grad.any()
    assert output.predictions[2].grad.abs().sum() > 0
