"""Two processes train as one does: same losses, same weights."""

import pytest
import torch

from movekd.train.sampler import GlobalOrderSampler
from torchrun import train_in_two_processes


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "distill"])
def test_two_ranks_equal_one(digits, tmp_path, stage):
    # finetune has text-only samples, so some ranks see batches without any image
    single = digits.train(tmp_path / "one", stage, "training.max_steps=3")
    config = digits.config(stage, "training.max_steps=3", "training.per_device_train_batch_size=2")
    logged = train_in_two_processes(config, tmp_path / "two", digits.cache)
    for one, two in zip(digits.logged(single), logged, strict=False):
        for name in {"loss_text", "loss_kd"} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-5)
    one, two = digits.weights(tmp_path / "one"), digits.weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_two_ranks_equal_one_where_samples_do_not_fill_the_last_batch(digits, tmp_path, stage):
    """24 captions or 36 images in batches of 10: the second process sees 1 or none of the last."""
    keys = ("training.num_train_epochs=1", "distill.summary_weight=0.5")
    single = digits.train(tmp_path / "one", stage, *keys, "training.per_device_train_batch_size=10")
    config = digits.config(stage, *keys, "training.per_device_train_batch_size=5")
    logged = train_in_two_processes(config, tmp_path / "two", digits.cache)
    assert len(logged) == len(digits.logged(single))
    for one, two in zip(digits.logged(single), logged, strict=True):
        assert "loss_summary" in one
        same = {"loss_text", "loss_kd", "loss_summary", "loss_balance", "grad_norm"}
        for name in same & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize(
    "own",
    [
        ("recipe=official",),
        ("recipe=revised",),
        ("recipe=revised", "student.mole.experts=per_teacher"),
    ],
    ids=["official", "revised", "per_teacher"],
)
def test_gradients_are_those_of_one_process_also_of_text_only_batches(digits, tmp_path, own):
    """One process, two, or two micro-batches: the same gradients to 1e-5, recomputed in backward.

    One step of plain SGD at rate 1 moves every weight by its gradient. The samples are not grouped
    by kind, so that one process sees a text-only batch while the other sees images.
    """
    seed = 3
    first_step = list(GlobalOrderSampler(16, seed))[:4]
    assert [position > 10 for position in first_step] == [True, True, False, False]  # 11-15: text
    keys = (
        *own,
        "data.group_by_modality_length=false",
        "distill.summary_weight=0.5",
        "student.mole.balance_weight=0",
        "training.gradient_checkpointing=true",
        "training.optim=sgd",
        "training.learning_rate=1",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.max_grad_norm=0",
        "training.max_steps=1",
        f"training.seed={seed}",
    )
    half = (*keys, "training.per_device_train_batch_size=2")
    one = digits.train(tmp_path / "one", "finetune", *keys)
    config = digits.config("finetune", *half)
    two = train_in_two_processes(config, tmp_path / "two", digits.cache)
    accumulated = digits.train(
        tmp_path / "halves", "finetune", *half, "training.gradient_accumulation_steps=2"
    )
    first = digits.logged(one)[0]
    for other in (two[0], digits.logged(accumulated)[0]):
        assert other.keys() >= first.keys() - {"total_flos"}
        for name in first:
            if name.startswith(("loss", "teacher_weight", "token_weight")) and "bal" not in name:
                assert other[name] == pytest.approx(first[name], rel=1e-4), name
    expected = digits.weights(tmp_path / "one")
    for folder in ("two", "halves"):
        found = digits.weights(tmp_path / folder)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
