"""The KD loss on rotated targets is the loss on targets that were rotated back."""

from dataclasses import replace

import pytest
import torch

from movekd.cache.codecs import codec
from movekd.cache.targets import TeacherTargets
from movekd.distill.config import LossTermConfig


@pytest.fixture
def step(digits, monkeypatch):
    """Return (loss, gradients by parameter, decodings used) of a batch whose targets are lloyd4."""

    def step(*overrides, never_rotates=False, has_extra_term=False):
        config = digits.config("distill", *overrides)
        model, _, dataset, collator = digits.parts(config)
        batch = collator([dataset[position] for position in range(4)])
        batch.pop("keys")
        few_bits = codec("lloyd4")
        monkeypatch.setattr(type(few_bits), "rotates", not never_rotates)
        decoded = []
        for name in ("decode_rotated", "decode_standardised"):
            method = getattr(type(few_bits), name)
            spy = lambda *given, m=method, n=name: (decoded.append(n), m(*given))[1]  # noqa: E731
            monkeypatch.setattr(type(few_bits), name, spy)
        for name, targets in batch["targets"].items():
            stats = targets.stats.for_codec(few_bits)
            exact_BND = targets.tokens_BND
            exact_BND[:, 0, 3] = 40 * targets.stats.std_D[3]  # an outlier in each image
            stored = dict(targets.stored) | few_bits.encode(exact_BND, stats)
            batch["targets"][name] = TeacherTargets(stored, stats, few_bits)
        if has_extra_term:  # somebody's function, which may read single channels
            terms = {"mine": LossTermConfig(weight=1.0)}
            model.objective = replace(model.objective, extra_terms=terms)
            monkeypatch.setattr("movekd.distill.objective.extra_term", lambda *_: ("mine", 0.0))
        torch.manual_seed(0)
        loss = digits.terms(model, batch)["kd"]
        loss.backward()
        monkeypatch.undo()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients, set(decoded)

    return step


@pytest.mark.parametrize("weighting", ["equal", "similarity"])
def test_loss_and_gradients_are_those_of_targets_rotated_back(step, weighting):
    key = f"distill.teacher_weighting={weighting}"
    rotated, gradients, decodings = step(key)
    expected, expected_gradients, back = step(key, never_rotates=True)
    assert decodings == {"decode_rotated"}
    assert back == {"decode_standardised"}
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    assert sum("adapters" in name for name in gradients) >= 12
    for name, gradient in expected_gradients.items():
        close = (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8
        assert close, name


@pytest.mark.parametrize(
    "key",
    ["distill.loss=smooth_l1", "distill.target_clip=8", "distill.targets=raw", "recipe=official"],
)
def test_what_is_no_plain_squared_error_sees_no_rotation(step, key):
    assert "decode_rotated" not in step(key)[2]


def test_an_extra_loss_term_sees_no_rotation(step):
    assert "decode_rotated" not in step(has_extra_term=True)[2]
