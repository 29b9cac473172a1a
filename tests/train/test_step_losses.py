"""Tests of movekd.train.step_losses: the figure follows from every step, also after a resume."""

import json
import statistics

import pytest
import torch

from movekd.train.step_losses import StepLosses
from torchrun import train_in_two_processes

NAMES = ("clip", "sam")
SAVING = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=null")


def figures(summary):
    """Return the figure of each teacher in the last entry of a run's log."""
    prefix = "kd_loss_max_over_median_"
    ending = summary.log[-1]
    assert "train_runtime" in ending
    return {n.removeprefix(prefix): r for n, r in ending.items() if n.startswith(prefix)}


def by_hand(digits, summary, last):
    """Return the same from a log of every step."""
    values = {n: [e[f"loss_kd_{n}"] for e in digits.logged(summary)[-last:]] for n in NAMES}
    return {n: max(v) / statistics.median(v) for n, v in values.items()}


def test_it_is_of_the_second_half_however_seldom_a_run_logs(digits, tmp_path):
    every = digits.train(tmp_path / "every", "distill")  # 9 steps
    assert figures(every) == pytest.approx(by_hand(digits, every, 5))
    assert all(ratio > 1 for ratio in figures(every).values())
    assert json.loads((tmp_path / "every/log.json").read_text()) == every.log
    seldom = digits.train(tmp_path / "seldom", "distill", "training.logging_steps=4")
    assert figures(seldom) == figures(every)
    assert len(digits.logged(seldom)) == 2


def test_interrupted_and_resumed_equals_uninterrupted(digits, tmp_path):
    keys = ("training.logging_steps=100", *SAVING)
    whole = digits.train(tmp_path / "whole", "distill", *keys)
    for done in (4, 8):

        def stop(what, now, total, done=done):
            if now == done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            digits.train(tmp_path / "part", "distill", *keys, resume=done > 4, progress=stop)
    part = digits.train(tmp_path / "part", "distill", *keys, resume=True)
    assert figures(part) == figures(whole)
    assert len(figures(whole)) == 2
    again = digits.train(tmp_path / "part", "distill", *keys, resume=True)  # no step is left
    assert figures(again) == figures(whole)


def test_accumulation_adds_up_to_the_steps(digits, tmp_path):
    keys = ("student.mole.lora_dropout=0", "student.mole.balance_weight=0")
    once = digits.train(tmp_path / "once", "distill", *keys)
    micro = ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4")
    parts = digits.train(tmp_path / "parts", "distill", *keys, *micro)
    assert figures(parts) == pytest.approx(figures(once), rel=1e-3)


@pytest.mark.slow
def test_two_ranks_add_up_to_the_steps(digits, tmp_path):
    keys = ("student.mole.lora_dropout=0", "student.mole.balance_weight=0")
    once = digits.train(tmp_path / "once", "distill", *keys)
    config = digits.config("distill", *keys, "training.per_device_train_batch_size=2")
    train_in_two_processes(config, tmp_path / "two", digits.cache)
    (ending,) = [
        entry
        for entry in json.loads((tmp_path / "two/log.json").read_text())
        if "train_runtime" in entry
    ]
    found = {name: ending[f"kd_loss_max_over_median_{name}"] for name in NAMES}
    assert found == pytest.approx(figures(once), rel=1e-3)


def test_a_run_without_teachers_has_none(digits, tmp_path):
    run = digits.train(tmp_path, "pretrain", "distill=null", "training.max_steps=2", *SAVING)
    assert figures(run) == {}


def part(clip, sam):
    return {"kd_clip": torch.tensor(float(clip)), "kd_sam": torch.tensor(float(sam))}


def test_steps_without_images_are_left_out_and_unknown_steps_leave_it_out():
    losses = StepLosses(NAMES, None, 0)
    for step, value in enumerate((100, 2, 0, 6, 2), start=1):  # the third is text only
        losses.add(step, 5, part(value, 0), num_images=0 if step == 3 else 4)
    losses.gather(1)
    assert losses.figures(5) == {"kd_loss_max_over_median_clip": 6 / 4}  # the median of sam is 0
    state = json.loads(json.dumps(losses.state()))
    assert StepLosses(NAMES, state, 5).figures(5) == losses.figures(5)
    assert StepLosses(("clip",), state, 5).figures(5) == {}
    for stored in (None, {}, {"teachers": 3}, state | {"losses": [["x"]]}):  # older, or damaged
        late = StepLosses(NAMES, stored, 3)
        late.add(4, 5, part(1, 1), 4)
        late.gather(1)
        assert late.figures(5) == {}
