"""Tests of movekd.train.trained_parts: what learns with LoRA, what is saved, and what starts."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from movekd.distill.objective import count_units, step_loss
from movekd.errors import ConfigError
from movekd.student.checkpoint import load_student, part_of
from movekd.student.language_lora import LORA_FILE, LORA_PART, has_adapter, is_adapter
from movekd.train.trained_parts import parts_to_save
from torchrun import train_in_two_processes

LORA = "student.language_model_lora={r: 4, lora_alpha: 8, lora_dropout: 0.2}"
NO_DROPOUT = "student.language_model_lora={r: 4, lora_alpha: 8, lora_dropout: 0}"
IN_4BIT = "student.load_in_4bit=true"
SHORT = ("distill=null", "training.max_steps=2")
IDS = torch.tensor([[1, 7, 30, 12, 44, 9, 3]])

modes = pytest.mark.parametrize("mode", [(), (IN_4BIT,)], ids=["full", "4 bit"])


def logits(vlm):
    with torch.no_grad():
        return vlm(input_ids=IDS).logits


def gradients(digits, config, recomputes=False):
    """Return name -> gradient of the vision-language model after one backward pass."""
    model, _, dataset, collator = digits.parts(config)
    model.train()
    if recomputes:
        model.activation_checkpointing_enable()
    batch = collator([dataset[position] for position in range(2)])
    batch.pop("keys")
    counts = count_units(batch)
    torch.manual_seed(1)
    loss, _ = step_loss(model(**batch), counts, 1)
    loss.backward()
    return {n: p.grad for n, p in model.vlm.named_parameters() if p.grad is not None}


@modes
@pytest.mark.parametrize("trained", ["[language_model]", "[mole, projector, language_model]"])
def test_only_the_named_parts_and_of_the_language_model_the_adapter_get_gradients(
    digits, trained, mode
):
    config = digits.config("finetune", "distill=null", f"trained={trained}", LORA, *mode)
    found = gradients(digits, config)
    model, *_ = digits.parts(config)
    expected = {
        name
        for name, _ in model.vlm.named_parameters()
        if part_of(name) in config.trained
        and (part_of(name) != "language_model" or is_adapter(name))
    }
    assert found.keys() == expected
    seconds = [name for name in found if "language_model" in name and ".lora_B." in name]
    assert len(seconds) == 4 * 7
    assert all(found[name].abs().sum() > 0 for name in seconds)


@modes
def test_recomputed_activations_give_the_same_gradients_with_a_frozen_base(digits, mode):
    """Nothing before the first block learns, which stops reentrant checkpointing."""
    keys = ("distill=null", "trained=[language_model]", NO_DROPOUT)
    config = digits.config("finetune", *keys, *mode)
    kept, recomputed = (gradients(digits, config, recomputes) for recomputes in (False, True))
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


@modes
def test_a_run_saves_the_adapter_and_resumes_to_the_same(digits, tmp_path, mode):
    keys = (LORA, "distill=null", "training.max_steps=3", *mode)
    saving = ("training.save_strategy=steps", "training.save_steps=1")

    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    whole = digits.train(tmp_path / "whole", "finetune", *keys, *saving)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "finetune", *keys, *saving, progress=stop)
    parts = digits.train(tmp_path / "parts", "finetune", *keys, *saving, resume=True)
    assert digits.logged(parts) == digits.logged(whole)
    first, second = (digits.weights(tmp_path / name) for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = tmp_path / "whole/model"
    assert (model / LORA_FILE).exists()
    assert not (model / "language_model.safetensors").exists()
    adapter = load_file(model / LORA_FILE)
    assert all(t.abs().sum() > 0 for n, t in adapter.items() if ".lora_B." in n)
    learned = set(load_file(tmp_path / "whole/checkpoint-3/trained.safetensors"))
    assert all(".lora_" in name for name in learned if ".language_model." in name)


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A stage 1, and a stage 2 with an adapter that began there."""
    folder = tmp_path_factory.mktemp("lora")
    digits.train(folder / "one", "pretrain", *SHORT)
    begin = f"init_from={folder / 'one'}"
    digits.train(folder / "two", "finetune", *SHORT, LORA, begin)
    return folder


def test_an_adapter_goes_on_as_one(digits, runs, tmp_path):
    keys = (*SHORT, LORA, f"init_from={runs / 'two'}", "training.learning_rate=0")
    digits.train(tmp_path / "three", "finetune", *keys)
    before, after = digits.weights(runs / "two"), digits.weights(tmp_path / "three")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_run_without_an_adapter_begins_from_the_merged_one(digits, runs, tmp_path, stage):
    """Also where the language model does not learn: it is saved, or the run could not be loaded."""
    keys = (*SHORT, f"init_from={runs / 'two'}", "training.learning_rate=0")
    digits.train(tmp_path / "three", stage, *keys)
    vlm = load_student(tmp_path / "three").student.vlm
    assert not has_adapter(vlm)
    expected = logits(load_student(runs / "two").student.vlm)
    assert (logits(vlm) - expected).abs().max() < 1e-5 * expected.abs().max()
    base = logits(load_student(runs / "one").student.vlm)
    assert (base - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_an_adapter_on_a_finetuned_base_keeps_both(digits, tmp_path):
    digits.train(tmp_path / "full", "finetune", *SHORT)
    keys = (*SHORT, LORA, f"init_from={tmp_path / 'full'}")
    digits.train(tmp_path / "lora", "finetune", *keys)
    first, second = digits.weights(tmp_path / "full"), digits.weights(tmp_path / "lora")
    names = [name for name in first if name.startswith("language_model.safetensors")]
    assert names
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert has_adapter(load_student(tmp_path / "lora").student.vlm)


@pytest.mark.slow
def test_an_adapter_leaves_the_encoder_stage_as_it_is(digits, runs, tmp_path):
    digits.train(tmp_path, "distill", "training.max_steps=1", f"init_from={runs / 'two'}")
    assert not (tmp_path / "model" / LORA_FILE).exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["student.language_model_lora={r: 8, lora_alpha: 8}"], r"language_model_lora\.r '4', and"),
        (["student.language_model_lora={r: 4}"], r"language_model_lora\.lora_alpha '8\.0', and"),
        (["trained=[projector]", IN_4BIT], r"holds language_model_lora/adapter.*load_in_4bit"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(digits, runs, tmp_path, keys, said):
    with pytest.raises(ConfigError, match=said):
        digits.train(tmp_path, "finetune", *SHORT, f"init_from={runs / 'two'}", *keys)


def test_4_bit_refuses_to_begin_from_a_finetuned_language_model(digits, runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "full")
    (tmp_path / "full/model/language_model.safetensors").write_bytes(b"")
    keys = (*SHORT, LORA, IN_4BIT, f"init_from={tmp_path / 'full'}")
    with pytest.raises(ConfigError, match=r"holds language_model\.safetensors, which would change"):
        digits.train(tmp_path / "run", "finetune", *keys)


def test_parts_to_save(digits):
    full, lora = digits.config("finetune"), digits.config("finetune", LORA)
    assert parts_to_save(full, []) == ["language_model", "mole", "projector", "vision_tower"]
    assert parts_to_save(lora, []) == [LORA_PART, "mole", "projector", "vision_tower"]
    assert parts_to_save(lora, ["language_model"])[:2] == ["language_model", LORA_PART]
    assert parts_to_save(digits.config("distill"), ["vision_tower", "projector"]) == [
        "mole",
        "vision_tower",
    ]


@pytest.mark.slow
@modes
def test_two_processes_train_the_adapter_as_one(digits, tmp_path, mode):
    keys = (NO_DROPOUT, "training.max_steps=2", *mode)
    single = digits.train(tmp_path / "one", "finetune", *keys)
    config = digits.config("finetune", *keys, "training.per_device_train_batch_size=2")
    logged = train_in_two_processes(config, tmp_path / "two", digits.cache)
    for one, two in zip(digits.logged(single), logged, strict=False):
        assert two["loss_text"] == pytest.approx(one["loss_text"], rel=1e-5)
    one, two = digits.weights(tmp_path / "one"), digits.weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-4, msg=name)
