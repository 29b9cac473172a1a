"""The gradients against plain loops over images and tokens, written from the equations.

Legend: B batch, N student tokens, M teacher tokens, S student width, T teacher width, H heads.
"""

import pytest
import torch
from torch.autograd import grad

from movekd.analysis.kd_gradient import NEAR, KDGradient, LossTargets

B, N, M, S, T, H = 3, 4, 9, 8, 6, 2
KEYS = [f"{number:064x}" for number in (5, 2**200, 11)]


def targets(seed: int, has_attention: bool = True) -> LossTargets:
    generator = torch.Generator().manual_seed(seed)
    attention_BHN = torch.rand(B, H, N, generator=generator) / N if has_attention else None
    return LossTargets(
        torch.randn(B, N, T, generator=generator),
        torch.randn(B, M, T, generator=generator) * 3 + 1,
        attention_BHN,
    )


@pytest.fixture
def gradient() -> KDGradient:
    return KDGradient(N, S, M, T, seed=3)


def beside(gradient, key, target_ND):
    """Return the target plus noise of a tenth of its norm, token by token."""
    noise_ND = gradient._draw([key], target_ND.shape[-1], "noise")[0]
    scaled = [NEAR * t.norm() / n.norm() * n for t, n in zip(target_ND, noise_ND, strict=True)]
    return target_ND + torch.stack(scaled)


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize("at", ["untrained", "near"])
def test_revised_is_the_plain_sum(gradient, at, has_attention) -> None:
    """mean_n w[n] mean_d (head(s)[n, d] - z[n, d])^2, by the chain rule, token by token."""
    exact, decoded = targets(0, has_attention), targets(1, has_attention)
    found_BNS = gradient.revised(KEYS, decoded, exact, at)
    assert found_BNS.shape == (B, N, S)
    for b, key in enumerate(KEYS):
        student_NS = gradient._draw([key], S, "student")[0].requires_grad_()
        prediction_NT = gradient._head(student_NS)
        value_NT = prediction_NT.detach()
        if at == "near":
            value_NT = beside(gradient, key, exact.standardised_BNT[b])
        weight_N = torch.ones(N)
        if has_attention:
            mean_N = decoded.attention_BHN[b].mean(0)
            weight_N = 0.5 + 0.5 * (N * mean_N / mean_N.sum()).clamp(max=4)
            weight_N = weight_N / weight_N.mean()
        error_NT = value_NT - decoded.standardised_BNT[b]
        slope_NT = 2 * weight_N[:, None] * error_NT / (N * T)
        (expected_NS,) = grad(prediction_NT, student_NS, slope_NT)
        torch.testing.assert_close(found_BNS[b], expected_NS)


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize("at", ["untrained", "near"])
def test_official_is_the_plain_sum(gradient, at, has_attention) -> None:
    """d/ds of mean_n l[n] + sum_n w[n] l[n], l[n] = mean_d (s[n, d] - adapted[n, d])^2."""
    exact, decoded = targets(0, has_attention), targets(1, has_attention)
    found_BNS = gradient.official(KEYS, decoded, exact, at)
    for b, key in enumerate(KEYS):
        student_NS = gradient._draw([key], S, "student")[0]
        if at == "near":
            student_NS = beside(gradient, key, gradient._adapter(exact.raw_BMT[b : b + 1])[0])
        adapted_NS = gradient._adapter(decoded.raw_BMT[b : b + 1])[0]
        weight_N = torch.full((N,), 1 / N)
        if has_attention:
            weight_N = weight_N + decoded.attention_BHN[b].mean(0).softmax(0)
        expected_NS = 2 * weight_N[:, None] * (student_NS - adapted_NS) / S
        torch.testing.assert_close(found_BNS[b], expected_NS)


def test_a_student_belongs_to_its_image_and_seed(gradient) -> None:
    """Not to its batch; and nothing is left of the random state."""
    exact = targets(0)
    one = LossTargets(exact.standardised_BNT[1:2], exact.raw_BMT[1:2], exact.attention_BHN[1:2])
    whole, alone = gradient.all(KEYS, exact, exact), gradient.all(KEYS[1:2], one, one)
    assert whole.keys() == alone.keys() == {
        "revised_untrained", "official_untrained", "revised_near", "official_near",
    }  # fmt: skip
    for name in whole:
        torch.testing.assert_close(whole[name][1:2], alone[name])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    other = KDGradient(N, S, M, T, seed=4).all(KEYS, exact, exact)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(other["revised_near"], whole["revised_near"])


def test_off_the_native_grid_there_is_no_official_gradient(gradient) -> None:
    exact = targets(0)
    pooled = LossTargets(exact.standardised_BNT, None, exact.attention_BHN)
    assert gradient.all(KEYS, pooled, pooled).keys() == {"revised_untrained", "revised_near"}
