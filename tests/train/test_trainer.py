"""Tests of movekd.train.trainer: what one optimizer step takes the mean over."""

import os
import select
import signal

import pytest
import torch
from accelerate import skip_first_batches
from safetensors.torch import load_file
from transformers import TrainingArguments

from movekd.distill import choice_share
from movekd.errors import TrainingError, WeightsError
from movekd.student import routing
from movekd.train.trainer import CHECKPOINT_FILE, DistillTrainer


@pytest.fixture
def make(digits, tmp_path):
    """Return the trainer of a run, and a function from positions to a batch."""

    def make(stage="finetune", *overrides):
        config = digits.config(stage, *overrides)
        model, _, dataset, collator = digits.parts(config)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            per_device_train_batch_size=4,
            disable_tqdm=True,
        )
        trainer = DistillTrainer(config, model, dataset, collator, args=arguments)
        model.eval()
        return trainer, lambda positions: collator([dataset[p] for p in positions])

    return make


def loss_of(trainer, batches):
    """Return the loss of one optimizer step, and its gradients."""
    counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts)
        loss.backward()
        total += loss.item()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    return total, gradients


@pytest.mark.parametrize("recipe", ["official", "revised"])
def test_the_loss_is_the_weighted_sum_of_means(digits, make, recipe):
    trainer, batch_of = make("finetune", f"recipe={recipe}")
    batch = batch_of([0, 10, 11, 1])
    terms = digits.terms(trainer.model, _fed(batch))
    num_tokens = (batch["labels"] != -100).sum()
    weight = {"official": 0.5, "revised": 2.0}[recipe]
    expected = terms["text"] / num_tokens + weight * terms["kd"] / 4
    expected = expected + 0.01 * terms["balance"] / 4  # images
    assert loss_of(trainer, [batch])[0] == pytest.approx(expected.detach().item(), rel=1e-5)


def test_text_counts_by_tokens_and_kd_by_images_over_the_whole_step(make):
    trainer, batch_of = make("finetune", "student.mole.balance_weight=0")
    # answers of unequal length; two images, one, none and none
    positions = [10, 0, 15, 11]
    whole, expected = loss_of(trainer, [batch_of(positions)])
    for parts in ([[10, 0], [15, 11]], [[10], [0], [15], [11]], [[11, 10, 0], [15]]):
        loss, found = loss_of(trainer, [batch_of(part) for part in parts])
        assert loss == pytest.approx(whole, rel=1e-5)
        for name, gradient in expected.items():
            if name in found:
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
            else:
                assert not gradient.any(), name


def test_a_bad_loss_names_samples_and_parts(make):
    trainer, batch_of = make()
    with torch.no_grad():
        trainer.model.vlm.lm_head.weight.fill_(float("inf"))
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 0, in the batch of two, text-0\. Parts: text"
    ):
        loss_of(trainer, [batch_of([10, 11])])


def test_the_share_of_each_expert_of_each_layer_is_logged(make):
    trainer, batch_of = make("pretrain")
    batches = [batch_of([0, 1]), batch_of([2, 3, 4])]
    loss_of(trainer, batches)
    logs = {"loss": 0.0}
    trainer.log(logs)
    expected_LE = 0
    for batch in batches:
        trainer.model(**_fed(batch))
        share_LE = choice_share(routing(trainer.model))
        expected_LE = expected_LE + share_LE * len(batch["pixel_values"]) / 5
    logged = {name: value for name, value in logs.items() if name.startswith("routing_share_")}
    assert logged == {
        f"routing_share_{layer}_{expert}": pytest.approx(expected_LE[layer, expert].item())
        for layer in range(5)
        for expert in range(3)
    }
    assert 0 <= logs["routing_entropy"] <= 1


def test_steps_without_images_do_not_dilute_how_busy_the_experts_are(digits, tmp_path):
    run = digits.train(tmp_path, "finetune", "training.logging_steps=2")  # some steps are text only
    with_images = [entry for entry in digits.logged(run) if "token_std" in entry]
    assert with_images
    for entry in with_images:
        for layer in range(5):
            shares = [entry[f"routing_share_{layer}_{expert}"] for expert in range(3)]
            assert sum(shares) == pytest.approx(1)


def test_the_rank_of_the_tokens_is_measured_in_logged_steps_alone(digits, tmp_path):
    logged = digits.logged(digits.train(tmp_path / "each", "pretrain"))
    assert all(1 <= entry["token_rank"] <= 96 for entry in logged)  # a step is an entry
    other = digits.train(tmp_path / "third", "pretrain", "training.logging_steps=3")
    expected = [entry["token_rank"] for entry in logged][2::3]
    assert [entry["token_rank"] for entry in digits.logged(other)] == pytest.approx(expected)


def test_a_batch_without_images_has_no_rank(digits, make):
    trainer, batch_of = make("finetune")
    trainer.state.logging_steps = 1
    loss_of(trainer, [batch_of([11])])
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert "token_rank" not in logs
    loss_of(trainer, [batch_of([0, 1]), batch_of([11])])
    trainer.log(logs)
    assert logs["token_rank"] == pytest.approx(
        digits.terms(trainer.model, _fed(batch_of([0, 1])))["token_rank"]
    )


def _fed(batch):
    return {key: value for key, value in batch.items() if key != "keys"}


def test_a_checkpoint_holds_what_learns_and_is_checked_when_read(make, tmp_path):
    trainer, _ = make("pretrain", "trained=[mole, projector]")
    trainer._save(str(tmp_path))
    saved = load_file(tmp_path / CHECKPOINT_FILE)
    learning = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert saved.keys() == learning.keys()
    assert all(".mole_" in n or "projector" in n or "adapters." in n for n in saved)
    before = {name: parameter.detach().clone() for name, parameter in learning.items()}
    with torch.no_grad():
        for parameter in learning.values():
            parameter.zero_()
    trainer._load_from_checkpoint(str(tmp_path))
    assert all(torch.equal(learning[name], before[name]) for name in before)
    other, _ = make("pretrain", "student.mole.num_experts=2")
    with pytest.raises(WeightsError, match=r"does not fit the model: .* of another shape"):
        other._load_from_checkpoint(str(tmp_path))


def test_the_order_is_grouped_in_finetune_only(make):
    for stage, is_grouped in (("pretrain", False), ("finetune", True)):
        trainer, _ = make(stage)
        sampler = trainer._get_train_sampler()
        lengths = trainer.train_dataset.modality_lengths()
        assert sorted(sampler) == list(range(len(lengths)))
        assert (sampler._lengths is not None) == is_grouped


@pytest.mark.parametrize("is_resumed", [False, True])
def test_decoding_processes_end_with_a_run_that_was_killed_at_their_start(make, is_resumed):
    """Between the fork and PyTorch's own watch, which would take the new parent for the old one.

    The child makes a pipe that only its decoding processes keep open, so the end of all of them is
    the end of the pipe.
    """
    trainer, _ = make("pretrain")
    trainer.args.dataloader_num_workers = 1
    loader = trainer.get_train_dataloader()
    if is_resumed:  # accelerate copies what the loader is made of
        loader = skip_first_batches(loader, 1)
    loader = loader.base_dataloader
    start = loader.worker_init_fn
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        run = os.getpid()

        def stopped(worker):
            """Kill the run when a decoding process starts, and return when it is dead."""
            start(worker)
            os.kill(os.getppid(), signal.SIGKILL)
            while os.getppid() == run:
                pass

        loader.worker_init_fn = stopped
        list(loader)
        os._exit(0)
    os.close(writes)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    is_over, _, _ = select.select([reads], [], [], 60)
    assert is_over
    assert os.read(reads, 1) == b""
    os.close(reads)
