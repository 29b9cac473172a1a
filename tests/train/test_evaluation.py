"""Tests of movekd.train.evaluation: the loss of held-out samples during a run."""

import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlavaForConditionalGeneration

from movekd.cache import open_cache
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError, TrainingError
from movekd.student.checkpoint import load_student
from movekd.train.checkpoints import require_checkpoint
from movekd.train.datasets import read_data
from movekd.train.evaluation import held_out_loader, held_out_losses
from movekd.train.run import build_model
from movekd.train.sources import Source
from torchrun import train_in_two_processes

HELD = ("data.val_size=5", "training.per_device_eval_batch_size=2")
DROPOUT = "student.mole.lora_dropout=0.3"
SAVING = ("training.save_strategy=steps", "training.save_total_limit=null")


def settings(batch_size=2, rank=0, world_size=1, workers=0):
    """Return what the loader reads of TrainingArguments."""
    return SimpleNamespace(
        eval_batch_size=batch_size,
        world_size=world_size,
        process_index=rank,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        dataloader_prefetch_factor=None,
        device=torch.device("cpu"),
    )


def built(digits, stage, *overrides):
    """Return the model of a run and its data."""
    config = digits.config(stage, *HELD, "training.eval_steps=1", *overrides)
    cache = None if config.distill is None else open_cache(digits.cache)
    torch.manual_seed(0)
    model, student = build_model(config, cache)
    (keys,) = config.data.all_sources()
    source = Source(keys, open_corpus(config.data.shards), cache)
    return model, read_data(config, [source], student)


def measured(model, data, **how):
    """Return the losses of the held-out samples, without times."""
    loader = held_out_loader(data.held_out, data.collator, settings(**how))
    return untimed(held_out_losses(model, loader, lambda batch: batch, settings(**how)))


def untimed(entry):
    timed = ("runtime", "per_second", "peak_gib")
    return {name: value for name, value in entry.items() if not name.endswith(timed)}


def evaluations(log):
    return [untimed(entry) for entry in log if "eval_loss" in entry]


def rows(summary):
    """Return every logged entry but the last, which is about the whole run."""
    return [untimed(entry) for entry in summary.log if "train_runtime" not in entry]


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A finetune of six steps with dropout that measures at its start and every second step."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    lines = []
    summary = digits.train(
        folder, "finetune", *WHOLE, "training.report_to=tensorboard", notify=lines.append
    )
    return folder, summary, lines


WHOLE = (
    *HELD,
    *SAVING,
    DROPOUT,
    "training.eval_steps=2",
    "training.eval_on_start=true",
    "training.save_steps=1",
    "training.num_train_epochs=2",
)


def test_the_log_has_the_held_out_losses_beside_the_training_ones(whole):
    folder, summary, lines = whole
    found = evaluations(summary.log)
    assert [entry["step"] for entry in found] == [0, 2, 4, 6]
    names = {"eval_loss", "eval_loss_text", "eval_loss_kd", "eval_loss_kd_clip", "eval_loss_kd_sam"}
    for entry in found:
        assert entry.keys() == names | {"step", "epoch"}
        expected = entry["eval_loss_text"] + 2 * entry["eval_loss_kd"]
        assert entry["eval_loss"] == pytest.approx(expected)
    assert found[-1]["eval_loss"] != found[0]["eval_loss"]
    assert evaluations(json.loads((folder / "log.json").read_text())) == found
    assert lines[0] == "5 conversations are held out, 11 are trained on."
    (curves,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(curves))
    events.Reload()
    for name in ("loss_text", "loss_kd", "loss_kd_sam"):
        assert f"train/{name}" in events.Tags()["scalars"]
        steps = [event.step for event in events.Scalars(f"eval/{name}")]
        assert steps == [0, 2, 4, 6]


def test_evaluation_changes_no_weight_and_no_training_loss(digits, whole, tmp_path):
    folder, summary, _ = whole
    keys = ("training.eval_strategy=no", "training.eval_on_start=false")
    without = digits.train(tmp_path / "without", "finetune", *WHOLE, *keys)
    assert digits.logged(without) == digits.logged(summary)
    one, two = digits.weights(folder), digits.weights(tmp_path / "without")
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    assert evaluations(without.log) == []


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_log_of_an_uninterrupted_one(digits, whole, tmp_path, stop):
    folder, summary, _ = whole

    def progress(what, done, total):
        if what.startswith("train") and done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "finetune", *WHOLE, progress=progress)
    more = "training.per_device_eval_batch_size=3"  # a resume may change it
    parts = digits.train(tmp_path / "parts", "finetune", *WHOLE, more, resume=True)
    found = rows(parts)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in rows(summary)]
    for one, other in zip(rows(summary), found, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    one, two = digits.weights(folder), digits.weights(tmp_path / "parts")
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    with pytest.raises(ConfigError, match=r"data\.val_size differ"):
        digits.train(tmp_path / "parts", "finetune", *WHOLE, "data.val_size=4", resume=True)


@pytest.mark.slow
def test_an_epoch_is_evaluated_once_also_when_it_is_resumed_at_its_end(digits, tmp_path):
    keys = (*HELD, *SAVING, "training.save_steps=1", "training.eval_strategy=epoch")
    keys = (*keys, "data.val_size=0.3", "training.num_train_epochs=3")
    whole = digits.train(tmp_path / "whole", "distill", *keys)
    per_epoch = whole.steps // 3
    found = [entry["step"] for entry in evaluations(whole.log)]
    assert found == [per_epoch, 2 * per_epoch, 3 * per_epoch]

    def progress(what, done, total):
        if done == per_epoch + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "distill", *keys, progress=progress)
    (tmp_path / "parts" / f"checkpoint-{per_epoch}").exists()
    parts = digits.train(tmp_path / "parts", "distill", *keys, resume=True)
    assert rows(parts) == rows(whole)


def test_ranks_and_batches_hold_every_sample_exactly_once(digits):
    _, data = built(digits, "finetune")
    every = [c.id for c in data.held_out.conversations]
    for size, world_size in [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3)]:
        keys, lengths = [], set()
        for rank in range(world_size):
            how = settings(size, rank, world_size)
            batches = list(held_out_loader(data.held_out, data.collator, how))
            lengths.add(len(batches))
            assert all(len(batch["keys"]) == size for batch in batches)
            keys += [key for batch in batches for key in batch["keys"]]
        assert len(lengths) == 1  # a forward pass may wait for the other ranks
        assert sorted(key for key in keys if key != "(filled up)") == sorted(every)


@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_the_losses_do_not_depend_on_the_batches(digits, stage):
    model, data = built(digits, stage, DROPOUT)
    model.train()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    expected = measured(model, data, batch_size=1)
    for how in ({"batch_size": 2}, {"batch_size": 16}, {"batch_size": 2, "workers": 1}):
        assert measured(model, data, **how) == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert ("eval_loss_text" in expected) == (stage != "distill")


def test_the_kd_loss_is_the_mean_over_held_out_images(digits):
    model, data = built(digits, "finetune", "data.val_size=9")
    found = measured(model, data, batch_size=4)
    model.eval()
    sums, num_images = {"kd": 0.0, "kd_clip": 0.0, "kd_sam": 0.0}, 0
    for position in range(len(data.held_out)):
        batch = data.collator([data.held_out[position]])
        if batch["pixel_values"] is None:
            continue
        num_images += len(batch["pixel_values"])
        del batch["keys"]
        terms = digits.terms(model, batch)
        for name in sums:
            sums[name] += terms[name].item()
    assert num_images
    for name, total in sums.items():
        assert found[f"eval_loss_{name}"] == pytest.approx(total / num_images, rel=1e-5)


def test_the_text_loss_is_that_of_stock_llava(digits):
    """The same ids, labels and pixels through transformers' own class, sample by sample."""
    model, data = built(digits, "finetune", "student.mole=null", "distill=null", "data.val_size=8")
    found = measured(model, data, batch_size=3)
    assert found.keys() == {"eval_loss", "eval_loss_text"}
    stock = LlavaForConditionalGeneration(copy.deepcopy(model.vlm.config)).eval()
    stock.load_state_dict(model.vlm.state_dict())
    total, num_tokens, num_with_image = 0.0, 0, 0
    for position in range(len(data.held_out)):
        batch = data.collator([data.held_out[position]])
        labels = batch["labels"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if batch["pixel_values"] is not None:
            inputs["pixel_values"], num_with_image = batch["pixel_values"], num_with_image + 1
        with torch.no_grad():
            mean = stock(**inputs, labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total, num_tokens = total + mean.item() * count, num_tokens + count
    assert 0 < num_with_image < len(data.held_out)
    assert found["eval_loss_text"] == pytest.approx(total / num_tokens, rel=1e-5)


def test_held_out_text_has_no_kd_loss_and_what_teaches_nothing_is_counted(digits, tmp_path):
    entries = json.loads((digits.source / "finetune.json").read_text())
    text = [entry for entry in entries if "image" not in entry]
    text.append(copy.deepcopy(text[0]))
    text[-1]["id"], text[-1]["conversations"][1]["value"] = "blank", " "
    (tmp_path / "text.json").write_text(json.dumps(text))
    keys = (f"data.eval_conversations=[{tmp_path / 'text.json'}]", "training.eval_steps=9")
    lines = []
    summary = digits.train(
        tmp_path / "run", "finetune", *keys, "training.max_steps=1", notify=lines.append
    )
    (entry,) = evaluations(summary.log)
    assert entry.keys() == {"eval_loss", "eval_loss_text", "step", "epoch"}
    assert entry["step"] == 1  # the last step is measured in any case
    assert lines[0] == "6 conversations are held out, 16 are trained on."
    assert lines[1].startswith("0 of 6 held-out conversations cut at")
    assert lines[1].endswith("1 have only empty answers (blank).")
    best = ("training.metric_for_best_model=loss_kd", "training.max_steps=1")
    with pytest.raises(ConfigError, match=r"is loss_kd, but no held-out conversation has an image"):
        digits.train(tmp_path / "other", "finetune", *keys, *best)
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert len(inputs["held-out conversations"]) == 1


BEST = (
    "data.val_size=0.3",
    "training.eval_steps=1",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.save_total_limit=1",
    "training.load_best_model_at_end=true",
    "training.metric_for_best_model=loss_text",
    "training.learning_rate=0.5",  # so high that a later step is worse
    "training.max_steps=5",
)


def best_step(summary):
    measures = {entry["step"]: entry["eval_loss_text"] for entry in evaluations(summary.log)}
    return min(measures, key=measures.get)


def test_the_best_step_is_the_model(digits, tmp_path):
    best = best_step(digits.train(tmp_path, "pretrain", *BEST))
    assert best < 4
    stored = load_file(tmp_path / f"checkpoint-{best}" / "trained.safetensors")
    parameters = dict(load_student(tmp_path).student.vlm.named_parameters())
    compared = {n: t for n, t in stored.items() if n.removeprefix("vlm.") in parameters}
    assert len(compared) > 10
    assert all(torch.equal(parameters[n.removeprefix("vlm.")], t) for n, t in compared.items())
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-5"}
    (tmp_path / f"checkpoint-{best}" / "trained.safetensors").unlink()
    with pytest.raises(TrainingError, match=rf"checkpoint-{best}, .*is not whole \(.* missing"):
        require_checkpoint(tmp_path, best)


@pytest.mark.slow
@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_the_best_step_is_the_same_after_a_resume(digits, tmp_path, save_strategy):
    keys = (*BEST, f"training.save_strategy={save_strategy}")

    def progress(what, done, total):
        if what.startswith("train") and done == 4:
            raise KeyboardInterrupt

    whole = digits.train(tmp_path / "whole", "pretrain", *keys)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "pretrain", *keys, progress=progress)
    parts = digits.train(tmp_path / "parts", "pretrain", *keys, resume=True)
    assert best_step(parts) == best_step(whole) < 4
    one, two = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert not [name for name in one if not torch.equal(one[name], two[name])]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_two_processes_measure_as_one(digits, tmp_path, stage):
    """A held-out number that no batch divides; some batches hold text, some nothing."""
    keys = (*HELD, "data.val_size=7", "training.eval_steps=1", "training.max_steps=2")
    keys = (*keys, "training.learning_rate=0", "training.eval_on_start=true")
    single = digits.train(tmp_path / "one", stage, *keys)
    half = digits.config(stage, *keys, "training.per_device_train_batch_size=2")
    train_in_two_processes(half, tmp_path / "two", digits.cache)
    log = json.loads((tmp_path / "two" / "log.json").read_text())
    assert len(evaluations(log)) == 3
    for one, two in zip(evaluations(single.log), evaluations(log), strict=True):
        assert two == pytest.approx(one, rel=1e-6)
