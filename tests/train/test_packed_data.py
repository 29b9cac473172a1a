"""Tests of movekd.train.packed_data: packed rows train as their conversations do one by one."""

import json

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorWithFlattening

from movekd.distill.objective import padding_statistic
from movekd.errors import ConfigError
from movekd.student.tokenization import IGNORED
from movekd.train.data import Sample
from movekd.train.packed_data import describe_packing, join
from movekd.train.packing_keys import require_packable
from movekd.train.sample_count import count_samples
from movekd.train.sampler import EMPTY
from movekd.train.show_samples import open_conversations
from same_step import assert_same_step, one_by_one, packed, step
from small_language_model import KINDS, write_language_model
from torchrun import train_in_two_processes

LENGTH = "data.model_max_length=200"
PACKED = ("data.packing=true", LENGTH)
EXACT = (
    "distill.summary_weight=0.5",
    "student.mole.lora_dropout=0",
    "training.optim=sgd",
    "training.learning_rate=0.1",
)


@pytest.fixture(scope="session")
def language_models(tmp_path_factory):
    """Return the folder of a small language model; each is written once."""
    written = {}

    def folder(name):
        if name not in written:
            written[name] = write_language_model(name, tmp_path_factory.mktemp(name))
        return written[name]

    return folder


@pytest.mark.parametrize("recipe", [pytest.param("official", marks=pytest.mark.slow), "revised"])
def test_a_step_of_rows_is_the_step_of_their_conversations(digits, recipe):
    """Questions, two images in one conversation, one image in several, and text only.

    The balance loss of the revised recipe is one of a batch, packed or not, and is left out.
    """
    config = digits.config("finetune", f"recipe={recipe}", *EXACT, *PACKED)
    model, _, dataset, collator = digits.parts(config)
    if recipe == "revised":
        model.has_experts = False  # the objective then has no balance loss
    rows = packed(dataset)
    assert 4 < len(rows) < len(dataset) / 2
    micro_batches = [range(2), range(2, len(rows))]
    batches = [collator([rows[row] for row in part]) for part in micro_batches]
    assert all(batch["position_ids"] is not None for batch in batches)
    singles = [collator([sample]) for sample in one_by_one(rows)]
    assert_same_step(model.eval(), batches, singles)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("gemma3", "sdpa"),
        *(
            pytest.param(name, attention, marks=pytest.mark.slow)
            for name in KINDS
            for attention in ("eager", "sdpa")
            if (name, attention) != ("gemma3", "sdpa")
        ),
    ],
)
def test_rows_with_images_train_every_kind_of_language_model(
    digits, language_models, name, attention
):
    overrides = (
        f"student.language_model={language_models(name)}",
        f"student.attn_implementation={attention}",
        "student.mole=null",
        "trained=[projector, vision_tower, language_model]",
        "distill=null",
        "data.model_max_length=256",
        "data.packing=true",
    )
    model, student, dataset, collator = digits.parts(digits.config("finetune", *overrides))
    assert student.vlm.model.language_model.config._attn_implementation == attention
    rows = packed(dataset)
    batch = collator([rows[row] for row in range(len(rows))])
    singles = [collator([sample]) for sample in one_by_one(rows)]
    assert_same_step(model.eval(), [batch], singles)


def test_a_row_is_its_samples_one_after_another():
    first = Sample("a", [5, 6, 7], [5, IGNORED, 7], [3], [30, 31])
    second = Sample("b", [8, 9], [8, 9], [], [])
    third = Sample("c", [4, 2], [IGNORED, 2], [1, 1], [10, 10])
    assert join([first, second, third]) == Sample(
        "a, b, c",
        [5, 6, 7, 8, 9, 4, 2],
        [IGNORED, IGNORED, 7, IGNORED, 9, IGNORED, 2],
        [3, 1, 1],
        [30, 31, 10, 10],
        (3, 2, 2),
    )


def test_a_row_is_what_transformers_own_collator_makes_of_its_samples(digits):
    _, _, dataset, collator = digits.parts(digits.config("finetune", *PACKED))
    rows = packed(dataset)
    flatten = DataCollatorWithFlattening()
    for number, row in enumerate(rows.rows):
        samples = [dataset[position] for position in row]
        expected = flatten([{"input_ids": s.input_ids, "labels": s.labels} for s in samples])
        found = collator([rows[number]])
        if len(row) == 1:  # as without packing
            assert found["position_ids"] is None
            continue
        assert set(expected) == {"input_ids", "labels", "position_ids"}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_positions_start_again_in_each_conversation_and_in_the_padding(digits):
    _, _, dataset, collator = digits.parts(digits.config("finetune", *PACKED))
    rows = packed(dataset)
    chosen = [rows[0], rows[EMPTY], rows[len(rows) - 1]]
    batch = collator(chosen)
    width = batch["input_ids"].shape[1]
    for sample, mask, found in zip(
        chosen, batch["attention_mask"], batch["position_ids"].tolist(), strict=True
    ):
        lengths = sample.lengths or (1,)
        parts = [*lengths, width - sum(lengths)]
        assert found == [at for length in parts for at in range(length)]
        assert int(mask.sum()) == sum(lengths)
    assert collator([dataset[0], dataset[1]])["position_ids"] is None
    lengths = [sum(sample.lengths or (1,)) for sample in chosen]
    statistic = padding_statistic(batch)
    assert statistic.value == pytest.approx(1 - sum(lengths) / (3 * width))
    assert statistic.weight == 3 * width


SHORT = ("distill=null", "student.mole=null", "trained=[projector]")
LONG = (
    "student.mole.lora_dropout=0.3",
    "training.num_train_epochs=2",
    "training.gradient_accumulation_steps=2",
    "training.dataloader_num_workers=1",
)


@pytest.mark.parametrize(
    ("overrides", "stops"), [(SHORT, (2,)), pytest.param(LONG, (1, 3), marks=pytest.mark.slow)]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_says_its_padding(
    digits, tmp_path, overrides, stops
):
    keys = (*PACKED, "training.per_device_train_batch_size=2", *overrides)
    saving = ("training.save_strategy=steps", "training.save_steps=1")
    said: list[str] = []
    whole = digits.train(tmp_path / "whole", "finetune", *keys, notify=said.append)
    for number, last in enumerate(stops):

        def stop(what, done, total, last=last):
            if what.startswith("train") and done == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            digits.train(
                tmp_path / "parts", "finetune", *keys, *saving, resume=number > 0, progress=stop
            )
    parts = digits.train(tmp_path / "parts", "finetune", *keys, *saving, resume=True)
    assert whole.steps == parts.steps > 2
    one, two = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert digits.logged(parts) == digits.logged(whole)
    assert all(0 <= entry["padding_share"] < 0.5 for entry in digits.logged(whole))
    inputs = tmp_path / "parts" / "inputs.json"
    changed = json.loads(inputs.read_text()) | {"packed rows": "of another tokenizer"}
    inputs.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="was begun with other packed rows"):
        digits.train(tmp_path / "parts", "finetune", *keys, *saving, resume=True)
    config = digits.config("finetune", *keys)
    (dataset,), _ = open_conversations(config)
    lengths = count_samples(dataset, needs_lengths=True).lengths
    assert said == [describe_packing(config, dataset, lengths)]
    assert said[0].startswith("16 conversations are packed into ")


@pytest.mark.slow
def test_an_adapter_learns_from_rows_also_where_fsdp_shards_the_model(digits, tmp_path):
    """PEFT's LoRA on the language model, as a whole model and with FSDP2 on one gloo process."""
    lora = "student.language_model_lora={r: 4, lora_alpha: 8}"
    trained = "trained=[mole, projector, language_model]"
    config = digits.config("finetune", lora, trained, *EXACT, *PACKED)
    model, _, dataset, collator = digits.parts(config)
    model.has_experts = False  # the balance loss is one of a batch
    rows = packed(dataset)
    batch = collator([rows[row] for row in range(len(rows))])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero, so that lora_A would get no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    singles = [collator([sample]) for sample in one_by_one(rows)]
    assert_same_step(model.eval(), [batch], singles)
    _, _, expected = step(model, [batch])
    learned = [name for name in expected if "lora_" in name]
    assert len(learned) > 8
    assert all(expected[name].abs().sum() > 0 for name in learned)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        for layer in model.vlm.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
        _, _, found = step(model, [batch])
        found = {name: gradient.full_tensor() for name, gradient in found.items()}
    finally:
        distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_ranks_equal_one(digits, tmp_path):
    """Rows of one step, in one process or two, the last step filled up with empty ones."""
    keys = (*PACKED, *EXACT, "training.gradient_checkpointing=true")
    single = digits.train(tmp_path / "one", "finetune", *keys)
    config = digits.config("finetune", *keys, "training.per_device_train_batch_size=2")
    logged = train_in_two_processes(config, tmp_path / "two", digits.cache)
    assert len(logged) == len(digits.logged(single)) > 1
    for one, two in zip(digits.logged(single), logged, strict=True):
        same = {"loss_text", "loss_kd", "loss_summary", "loss_balance", "grad_norm"}
        assert {"loss_text", "padding_share"} <= one.keys() & two.keys()
        for name in same & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    one, two = digits.weights(tmp_path / "one"), digits.weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("distill", (), "stage: distill reads no text"),
        ("finetune", ("data.group_by_modality_length=true",), "are both true; expected one"),
        (
            "finetune",
            ("student.attn_implementation=flash_attention_2",),
            "expected 1, because transformers tells packed samples apart",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(digits, stage, overrides, message):
    with pytest.raises(ConfigError, match=message):
        digits.config(stage, "data.packing=true", *overrides)


def test_a_kind_of_language_model_that_nobody_compared_is_refused(digits, tmp_path):
    folder = tmp_path / "mamba"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    keys = ("data.packing=true", f"student.language_model={folder}")
    with pytest.raises(ConfigError, match="is of type 'mamba'; expected one that is known"):
        digits.train(tmp_path / "run", "finetune", *keys)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="'mamba'"):
        require_packable(digits.config("finetune", *keys))


def test_packing_groups_no_modalities_and_a_run_without_it_has_the_former_defaults(digits):
    assert digits.config("finetune", "data.packing=true").data.group_by_modality_length is False
    assert digits.config("finetune").data.group_by_modality_length is True
    assert digits.config("finetune").data.packing is False
