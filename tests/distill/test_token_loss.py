"""Tests of movekd.distill.token_loss: torch's own losses, token weights, the limit."""

import pytest
import torch
from torch.nn import functional as F

from movekd.distill import kd_loss, token_loss
from movekd.distill.token_loss import limit
from movekd.errors import ConfigError

B, N, D = 3, 4, 7
FORMS = ("mse", "smooth_l1", "cosine+smooth_l1")


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and targets with errors below and above 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, D, generator=generator), 3 * torch.randn(B, N, D, generator=generator)


def expected_losses(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mean over all tokens, by torch's own functions and modules."""
    rows, goals = prediction.flatten(0, 1), target.flatten(0, 1)
    smooth = F.smooth_l1_loss(prediction, target)
    theirs = F.cosine_embedding_loss(rows, goals, torch.ones(len(rows)))  # as Theia computes it
    torch.testing.assert_close(theirs, 1 - F.cosine_similarity(rows, goals).mean())
    return {
        "mse": F.mse_loss(prediction, target),
        "smooth_l1": smooth,
        "cosine+smooth_l1": 0.9 * theirs + 0.1 * smooth,
    }


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_and_its_gradient_are_torchs(form: str) -> None:
    prediction, target = pair()
    prediction.requires_grad_()
    found, expected = (
        token_loss(prediction, target, form),
        expected_losses(prediction, target)[form],
    )
    assert found.shape == (B, N)
    torch.testing.assert_close(found.mean(), expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, prediction)[0] for loss in (found.mean(), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_token_and_teacher_weights_apply_to_every_form(form: str, combine: str) -> None:
    prediction, target = pair()
    generator = torch.Generator().manual_seed(1)
    weights_BN, teachers_B1 = (
        torch.rand(B, N, generator=generator),
        torch.rand(B, 1, generator=generator),
    )
    found = kd_loss([prediction], [target], teachers_B1, weights_BN, combine=combine, form=form)
    for b in range(B):
        of_token = [
            expected_losses(prediction[b, n : n + 1, None], target[b, n : n + 1, None])[form]
            if form != "cosine+smooth_l1"
            else expected_losses(prediction[b : b + 1, n : n + 1], target[b : b + 1, n : n + 1])[
                form
            ]
            for n in range(N)
        ]
        weighted = sum(weights_BN[b, n] * of_token[n] for n in range(N))
        loss = weighted / N if combine == "mean" else sum(of_token) / N + weighted
        torch.testing.assert_close(found.per_teacher_BT[b, 0], loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.total_B[b], teachers_B1[b, 0] * loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_and_autocast_leave_the_loss_in_float32(form: str) -> None:
    prediction, target = (tensor.bfloat16() for tensor in pair())
    exact = token_loss(prediction.float(), target.float(), form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_loss(prediction, target, form)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("form", FORMS)
def test_equal_tokens_cost_nothing_and_zeros_are_no_nan(form: str) -> None:
    target = pair()[1]
    assert token_loss(target, target, form).abs().max() < 1e-6
    zeros = torch.zeros(B, N, D, requires_grad=True)
    token_loss(zeros, target, form).sum().backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()
    assert token_loss(torch.zeros(1, 1, D), torch.zeros(1, 1, D), form).isfinite().all()


def test_an_outlier_pulls_a_robust_form_no_harder_than_a_small_error() -> None:
    prediction, target = torch.zeros(1, 1, D, requires_grad=True), torch.zeros(1, 1, D)
    target[..., 0], target[..., 1] = 1461.0, 2.0
    pulls = {}
    for form in ("mse", "smooth_l1"):
        (gradient,) = torch.autograd.grad(token_loss(prediction, target, form).sum(), prediction)
        pulls[form] = float(gradient[0, 0, 0] / gradient[0, 0, 1])
    assert pulls["mse"] == pytest.approx(1461 / 2)
    assert pulls["smooth_l1"] == 1


def test_the_limit_moves_only_what_is_beyond_it() -> None:
    tokens = pair()[1]
    limited = limit(tokens, 2.0)
    assert limited.abs().max() == 2
    inside = tokens.abs() <= 2
    assert torch.equal(limited[inside], tokens[inside])
    assert limit(tokens, 0) is tokens
    assert limit(tokens, None) is tokens


def test_an_unknown_form_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'smooth_l2'; expected one of mse.*'smooth_l1'"):
        token_loss(*pair(), "smooth_l2")  # type: ignore[arg-type]
