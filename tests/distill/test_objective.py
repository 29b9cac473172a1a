"""Tests of movekd.distill.objective: normalisation, what is logged, and the registry.

Training with a registered term is in tests/train/test_loss_terms.py.
"""

import pytest
import torch

from movekd.distill.config import LossTermConfig
from movekd.distill.objective import (
    LOSS_TERMS,
    LossLog,
    LossTerm,
    Objective,
    Statistic,
    StudentOutput,
    count_units,
    read_loss_terms,
    register_loss_term,
    step_loss,
)
from movekd.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("movekd.distill.objective.LOSS_TERMS", {})


def terms_of(*losses):
    return [LossTerm(*loss) for loss in losses]


def test_the_loss_is_the_weighted_sum_of_means_over_the_step():
    whole = terms_of(
        ("text", torch.tensor(12.0), "answer_tokens", 1.0),
        ("kd", torch.tensor(6.0), "images", 0.5),
        ("kd_clip", torch.tensor(60.0), "images", None),
        ("balance", torch.tensor(8.0), "views", 0.01),
    )
    loss, parts = step_loss(whole, torch.tensor([4, 3, 8]), world_size=1)
    assert parts == {"text": 3, "kd": 2, "kd_clip": 20, "balance": 1}
    assert loss == pytest.approx(3 + 0.5 * 2 + 0.01 * 1)


def test_parts_of_micro_batches_add_up_and_ranks_average_to_the_step():
    counts = torch.tensor([0, 5, 5])
    sums = [torch.tensor(value) for value in (1.0, 2.0, 4.0, 3.0)]
    losses = [step_loss(terms_of(("kd", s, "images", 2.0)), counts, 2)[0] for s in sums]
    two_ranks = (losses[0] + losses[1] + losses[2] + losses[3]) / 2
    assert two_ranks == pytest.approx(2.0 * 10 / 5)


def test_a_step_without_a_unit_has_no_such_loss():
    loss, parts = step_loss(
        terms_of(("text", torch.tensor(0.0), "answer_tokens", 1.0)), torch.zeros(3), world_size=1
    )
    assert loss == parts["text"] == 0


def test_units_are_counted_from_the_batch():
    labels = torch.tensor([[5, -100, 7, 8], [-100, 3, -100, -100]])  # nothing predicts the first
    batch = {"labels": labels, "pixel_values": torch.zeros(5, 3, 2, 2), "target_views": None}
    assert count_units(batch).tolist() == [3, 5, 5]
    assert count_units(batch | {"target_views": torch.tensor([0, 3])}).tolist() == [3, 2, 5]
    assert count_units({"pixel_values": None}).tolist() == [0, 0, 0]


def test_a_loss_is_averaged_over_steps_and_a_statistic_over_its_weights():
    log = LossLog()
    share = torch.tensor([[0.25, 0.75]])
    for part, num_images in ((1.0, 3), (2.0, 0), (6.0, 1)):
        log.num_steps += 1
        statistics = [
            Statistic("token_std", torch.tensor(2.0 * part), num_images),
            Statistic("share", share, num_images),
        ]
        log.add({"kd": torch.tensor(part, requires_grad=True)}, statistics)
    assert log.take(CPU) == {
        "loss_kd": 3,
        "token_std": (3 * 2 + 1 * 12) / 4,
        "share_0_0": 0.25,
        "share_0_1": 0.75,
    }
    log.num_steps += 1
    log.add({"kd": torch.tensor(5.0)}, [Statistic("token_std", torch.tensor(7.0), 0)])
    assert log.take(CPU) == {"loss_kd": 5}


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
