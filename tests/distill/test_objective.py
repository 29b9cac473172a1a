"""Tests of movekd.distill.objective: how terms are normalised, and what is logged."""

import pytest
import torch

from movekd.distill.loss_terms import LossTerm, Statistic
from movekd.distill.objective import LossLog, count_units, step_loss

CPU = torch.device("cpu")


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
