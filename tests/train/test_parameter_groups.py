"""Tests of movekd.train.parameter_groups: which parameters learn at which rate."""

import pytest
import torch
import yaml
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from transformers import Trainer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from movekd.distill.objective import count_units, step_loss
from movekd.errors import ConfigError
from movekd.train.config import load_config
from movekd.train.parameter_groups import RateLog
from movekd.train.trainer import DistillTrainer
from movekd.train.training_args import training_arguments
from torchrun import train_in_two_processes

THREE = (
    "learning_rates={projector: 2e-3, vision_tower: 2e-4, heads: 0.01}",
    "training.weight_decay=0.1",
)


def trainer_of(digits, folder, stage, *overrides):
    """Return the trainer of a run that has not started."""
    config = digits.config(stage, *overrides)
    model, _, dataset, collator = digits.parts(config)
    arguments = training_arguments(config, folder / "run")
    return DistillTrainer(config, model, dataset, collator, args=arguments)


def groups_of(trainer):
    """Return names, weight decay and rate of every group."""
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return [
        ([names[id(p)] for p in group["params"]], group["weight_decay"], group["lr"])
        for group in trainer.create_optimizer().param_groups
    ]


def without_norms(module, norms):
    """Return the names of all parameters but those of norms, as LLaVA's transformers does."""
    found = list(module._parameters)
    for name, child in module.named_children():
        if not isinstance(child, norms):
            found += [f"{name}.{inner}" for inner in without_norms(child, norms)]
    return found


def llava_groups(model, learning_rate, mm_projector_lr, weight_decay):
    """Return LLaVA's four groups: llava/train/llava_trainer.py, create_optimizer."""
    norms = (nn.LayerNorm, LlamaRMSNorm)
    decay = {name for name in without_norms(model, norms) if "bias" not in name}
    projector = {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}
    groups = []
    for is_projector, rate in ((False, learning_rate), (True, mm_projector_lr)):
        for is_decayed in (True, False):
            names = [
                name
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and (name in decay) == is_decayed
                and (name in projector) == is_projector
            ]
            groups.append((names, weight_decay if is_decayed else 0.0, rate))
    return groups


def test_without_rates_the_groups_are_those_of_trainer(digits, tmp_path):
    trainer = trainer_of(digits, tmp_path, "finetune", "training.weight_decay=0.1")
    ours = trainer.create_optimizer()
    stock = Trainer(trainer.model, trainer.args, train_dataset=trainer.train_dataset)
    theirs = stock.create_optimizer()
    assert len(ours.param_groups) == 2
    for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        assert one.keys() == other.keys()
        assert all(one[key] == other[key] for key in one.keys() - {"params"})


def test_a_projectors_rate_gives_the_four_groups_of_llava(digits, tmp_path):
    keys = ("learning_rates={projector: 2e-5}", "training.weight_decay=0.1")
    trainer = trainer_of(digits, tmp_path, "finetune", *keys, "distill=null")
    expected = llava_groups(trainer.model, 1e-3, 2e-5, 0.1)
    assert groups_of(trainer) == expected
    assert all(names for names, *_ in expected)


def test_every_parameter_that_learns_is_in_the_group_of_its_part(digits, tmp_path):
    trainer = trainer_of(digits, tmp_path, "finetune", *THREE)
    vlm = trainer.model.vlm
    vlm.model.image_newline = nn.Parameter(torch.zeros(8))  # as in LLaVA-NeXT
    groups = groups_of(trainer)
    names = [name for group, *_ in groups for name in group]
    assert sorted(names) == sorted(n for n, p in trainer.model.named_parameters())
    rate_by_name = {name: rate for group, _, rate in groups for name in group}
    decay_by_name = {name: decay for group, decay, _ in groups for name in group}
    rates = {"multi_modal_projector": 2e-3, "image_newline": 2e-3, "adapters.": 0.01}
    for name, rate in rate_by_name.items():
        part = 2e-4 if "vision_tower" in name and ".mole_" not in name else 1e-3
        assert rate == next((rates[word] for word in rates if word in name), part), name
    for name, decay in decay_by_name.items():
        is_plain = any(word in name for word in ("bias", "norm", "layrnorm"))
        assert decay == (0 if is_plain else 0.1), name
    for word in ("image_newline", "class_embedding", "lora_A", "lora_B", "mole_router"):
        assert any(word in n and decay_by_name[n] == 0.1 for n in names), word


def test_only_parts_that_learn_have_a_rate(digits, tmp_path):
    rates = "learning_rates={mole: 1e-5, heads: 0}"
    trainer = trainer_of(digits, tmp_path, "pretrain", rates)
    learning = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    groups = groups_of(trainer)
    assert {name for names, *_ in groups for name in names} == learning
    # the tower's is the recipe's
    assert [rate for *_, rate in groups] == [1e-3, 1e-3, 1e-5, 1e-5, 1e-4, 1e-4, 0, 0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["learning_rates.vision_tower=1e-5", "recipe=revised_2026_11"],
            r"vision_tower is 1e-05, but .* mole, projector, h",
        ),
        (["learning_rates.heads=1", "distill=null"], r"heads do not learn in this run; .* Take it"),
        (["learning_rates.heads=1", "recipe=official", "distill.teachers=[clip]"], "heads do not"),
        (["student.mole=null", "learning_rates.mole=1"], r"mole does not learn.*projector, heads"),
        (["learning_rates.proyector=1"], r"unknown key 'learning_rates\.proyector'.*'projector'"),
        (["learning_rates.projector=-1"], r"learning_rates\.projector: .*greater than or equal"),
        (["learning_rates.projector=true"], r"learning_rates\.projector: expected a number"),
        (["training.mm_projector_lr=2e-5"], r"write `learning_rates: \{projector: 2e-05\}` at"),
        (["training.mm_vision_tower_lr=2e-6"], r"\{vision_tower: 2e-06, mole: 2e-06\}` at the top"),
        (["training.learning_rates={projector: 1}"], r"top level of student\.yaml, beside trained"),
    ],
)
def test_a_rate_that_no_part_would_take_is_a_sentence(digits, overrides, said):
    with pytest.raises(ConfigError, match=said):
        digits.config("pretrain", *overrides)


def test_rates_are_read_back_and_may_be_null(digits, tmp_path):
    config = digits.config("finetune", *THREE, "learning_rates.mole=null")
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    assert config.learning_rates.given() == {"projector": 2e-3, "vision_tower": 2e-4, "heads": 0.01}
    trainer = trainer_of(digits, tmp_path, "finetune", "learning_rates={mole: null}")
    assert len(groups_of(trainer)) == 2


def test_an_optimizer_that_keeps_its_parameters_elsewhere_is_refused(digits, tmp_path):
    trainer = trainer_of(digits, tmp_path, "pretrain", "learning_rates={projector: 1}")
    trainer.optimizer_cls_and_kwargs = (Elsewhere, {"lr": 1})
    with pytest.raises(ConfigError, match=r"projector is 1, but Elsewhere holds no parameter of p"):
        trainer.create_optimizer()


class Elsewhere(torch.optim.SGD):
    """Keeps no parameter of the model in its groups, as layer-wise optimizers do."""

    def __init__(self, groups, lr):
        super().__init__([nn.Parameter(torch.zeros(1))], lr)


def stop_at(step):
    """Return a progress function that interrupts the run when ``step`` is done."""

    def progress(what, done, total):
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_a_resumed_run_with_three_rates_ends_as_an_uninterrupted_one(digits, tmp_path):
    keys = (*THREE, "training.save_strategy=steps", "training.save_steps=2")
    whole = digits.train(tmp_path / "whole", "finetune", *keys)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "finetune", *keys, progress=stop_at(3))
    with pytest.raises(ConfigError, match=r"another config: learning_rates\.heads differ"):
        digits.train(tmp_path / "parts", "finetune", *keys, "learning_rates.heads=1", resume=True)
    parts = digits.train(tmp_path / "parts", "finetune", *keys, resume=True)
    assert digits.logged(parts) == digits.logged(whole)
    expected, found = (digits.weights(tmp_path / name) for name in ("whole", "parts"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for entry in digits.logged(whole):  # every group follows the same curve
        for part, rate in (("projector", 2e-3), ("vision_tower", 2e-4), ("heads", 0.01)):
            scaled = entry["learning_rate"] * rate / 1e-3
            assert entry[f"learning_rate_{part}"] == pytest.approx(scaled)
        assert "learning_rate_mole" not in entry
    assert len({entry["learning_rate"] for entry in digits.logged(whole)}) > 2


def test_the_rate_of_all_is_logged_where_something_learns_at_it(digits, tmp_path):
    rates = "learning_rates={mole: 1e-3, heads: 1e-2}"
    trainer = trainer_of(digits, tmp_path, "distill", rates)
    log, logs = RateLog(), {"learning_rate": 1e-3}
    log.add_to(logs)
    assert logs == {"learning_rate": 1e-3}  # before the first step
    log.on_optimizer_step(None, None, None, optimizer=trainer.create_optimizer())
    log.add_to(logs)
    assert logs == {"learning_rate_mole": 1e-3, "learning_rate_heads": 1e-2}


@pytest.mark.slow
def test_a_run_without_the_keys_of_today_is_resumed(digits, tmp_path):
    keys = ("training.save_strategy=steps", "training.save_steps=1", "training.max_steps=3")
    keys += ("recipe=revised_2026_11",)
    digits.train(tmp_path / "whole", "pretrain", *keys)
    with pytest.raises(KeyboardInterrupt):
        digits.train(tmp_path / "parts", "pretrain", *keys, progress=stop_at(2))
    content = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert content.pop("learning_rates", 1) is None
    assert content["student"].pop("attn_implementation", 1) is None
    (tmp_path / "parts" / "config.yaml").write_text(yaml.safe_dump(content))
    digits.train(tmp_path / "parts", "pretrain", *keys, resume=True)
    expected, found = (digits.weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_sharded_model_takes_a_step_at_the_rates_of_its_parts(digits, tmp_path):
    keys = (*THREE[1:], "learning_rates={mole: 0.1, heads: 0.01}", "trained=[mole]")
    keys += ("training.optim=sgd", "training.optim_args=momentum=0.9")
    weights = {}
    for kind in ("whole", "sharded"):
        trainer = trainer_of(digits, tmp_path, "distill", *keys)
        model = trainer.model
        batch = trainer.data_collator([trainer.train_dataset[at] for at in range(2)])
        batch.pop("keys")
        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / kind}", rank=0, world_size=1
        )
        try:
            if kind == "sharded":
                fully_shard(model)
            optimizer = trainer.create_optimizer()
            assert len(optimizer.param_groups) == 4  # all that learns has a rate
            loss, _ = step_loss(model(**batch), count_units(batch), world_size=1)
            loss.backward()
            optimizer.step()
            if kind == "sharded":  # what accelerate writes into a checkpoint, and reads
                state = get_optimizer_state_dict(model, optimizer)
                trainer.optimizer = None
                again = trainer.create_optimizer()
                set_optimizer_state_dict(model, again, state)
                for one, other in zip(again.param_groups, optimizer.param_groups, strict=True):
                    assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
                    assert all(one[key] == other[key] for key in ("lr", "name", "weight_decay"))
                assert again.state.keys() == optimizer.state.keys()
                for parameter, kept in optimizer.state.items():
                    found = again.state[parameter]["momentum_buffer"]
                    assert torch.equal(found.to_local(), kept["momentum_buffer"].to_local())
        finally:
            distributed.destroy_process_group()
        weights[kind] = {n: getattr(p, "_local_tensor", p) for n, p in model.named_parameters()}
    assert weights["whole"].keys() == weights["sharded"].keys()
    for name, weight in weights["whole"].items():
        torch.testing.assert_close(weights["sharded"][name], weight)


@pytest.mark.slow
def test_two_processes_with_three_rates_equal_one(digits, tmp_path):
    keys = (*THREE, "training.max_steps=3")
    single = digits.train(tmp_path / "one", "finetune", *keys)
    config = digits.config("finetune", *keys, "training.per_device_train_batch_size=2")
    logged = train_in_two_processes(config, tmp_path / "two", digits.cache)
    for one, two in zip(digits.logged(single), logged, strict=True):
        for name in one:
            if name.startswith(("learning_rate", "loss_text", "loss_kd")):
                assert two[name] == pytest.approx(one[name], rel=1e-5), name
    one, two = digits.weights(tmp_path / "one"), digits.weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=4e-4, msg=name)
