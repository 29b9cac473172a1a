"""Tests of movekd.distill.loss_terms: what may be registered, and what a term must return.

Training with a registered term is in tests/train/test_loss_terms.py.
"""

import pytest
import torch

from movekd.distill.config import LossTermConfig
from movekd.distill.loss_terms import (
    LOSS_TERMS,
    StudentOutput,
    read_loss_terms,
    register_loss_term,
)
from movekd.distill.objective import Objective
from movekd.errors import ConfigError


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("movekd.distill.loss_terms.LOSS_TERMS", {})


class MarginConfig(LossTermConfig):
    margin: float = 1.0


def test_keys_of_a_registered_term_are_checked(registry):
    register_loss_term("margin", lambda output, keys: output.student_IND.sum(), config=MarginConfig)
    assert read_loss_terms({"margin": {"weight": 0.1}}, has_targets=True)["margin"] == MarginConfig(
        weight=0.1
    )
    with pytest.raises(ConfigError, match=r"'margn'.*registered: margin\).*Did you mean 'margin'"):
        read_loss_terms({"margn": {"weight": 0.1}}, has_targets=True)
    with pytest.raises(ConfigError, match=r"loss_terms\.margin: unknown key 'margi'.*'margin'"):
        read_loss_terms({"margin": {"weight": 0.1, "margi": 2}}, has_targets=True)
    with pytest.raises(ConfigError, match=r"loss_terms\.margin: key 'weight' is missing"):
        read_loss_terms({"margin": {}}, has_targets=True)


def test_a_term_that_needs_targets_is_refused_without_them(registry):
    register_loss_term("cosine", lambda output, keys: output.goals[0].sum(), needs_targets=True)
    keys = {"cosine": {"weight": 0.1}}
    assert read_loss_terms(keys, has_targets=True).keys() == {"cosine"}
    with pytest.raises(ConfigError, match=r"'cosine', which needs .*distill is null.*Set distill"):
        read_loss_terms(keys, has_targets=False)


def test_a_name_keeps_its_function(registry):
    def first(output, keys):
        return output.student_IND.sum()

    register_loss_term("rows", first)
    register_loss_term("rows", first)  # a module that is loaded again
    with pytest.raises(ConfigError, match="'rows' is registered with another function"):
        register_loss_term("rows", lambda output, keys: output.student_IND.sum())


@pytest.mark.parametrize("name", ["text", "kd", "kd_clip", "balance"])
def test_a_name_that_is_logged_already_is_refused(name):
    with pytest.raises(ConfigError, match="Register it under another name"):
        register_loss_term(name, lambda output, keys: output.student_IND.sum())
    assert name not in LOSS_TERMS


def test_a_term_must_be_a_sum(registry):
    register_loss_term("rows", lambda output, keys: output.student_IND.sum(2))
    objective = Objective(extra_terms=read_loss_terms({"rows": {"weight": 1}}, has_targets=True))
    output = StudentOutput(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(ConfigError, match=r"'rows' returned shape \(2, 3\); expected a scalar"):
        objective.terms(output)


def test_a_term_is_not_asked_about_a_batch_without_its_unit(registry):
    def fail(output, keys):
        raise AssertionError

    register_loss_term("of_images", fail)
    register_loss_term("of_tokens", fail, unit="answer_tokens")
    keys = {name: {"weight": 1.0} for name in ("of_images", "of_tokens")}
    objective = Objective(extra_terms=read_loss_terms(keys, has_targets=True))
    blank = torch.zeros(1, 3, 4)
    output = StudentOutput(blank, blank, labels=torch.full((2, 5), -100), has_images=False)
    assert [(t.name, t.sum.item()) for t in objective.terms(output)[:2]] == [
        ("of_images", 0),
        ("of_tokens", 0),
    ]
