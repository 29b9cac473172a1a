"""Tests of movekd.train.fsdp: FSDP2 is asked for or refused, never silently something else."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from movekd.distill.objective import count_units, step_loss
from movekd.errors import ConfigError
from movekd.resources import resource_dir
from movekd.student.checkpoint import save_parts
from movekd.train.fsdp import (
    complete_optimizer_state,
    gather_parameters,
    refuse_zero3,
    require_fsdp2,
)

FILES = resource_dir("pipelines") / "accelerate"


def test_fsdp_on_a_cpu_is_refused_before_anything_is_written(digits, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"FSDP2 was asked for, but this run is on a CPU"):
        digits.train(tmp_path / "run", "pretrain", "training.fsdp=true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"accelerators only and would silently train with DDP"):
        digits.train(tmp_path / "run", "pretrain")
    assert not (tmp_path / "run").exists()


def test_what_accelerate_chose_instead_is_named(tmp_path, monkeypatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = SimpleNamespace()
    chosen = SimpleNamespace(is_fsdp2=False, distributed_type="MULTI_GPU", state=state)
    require_fsdp2(arguments, chosen)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"accelerate chose MULTI_GPU; expected FSDP of version"):
        require_fsdp2(arguments, chosen)
    chosen = SimpleNamespace(is_fsdp2=True, distributed_type="FSDP", state=state)
    require_fsdp2(arguments, chosen)


def test_zero_3_is_refused_wherever_it_is_asked_for(tmp_path):
    """By `training.deepspeed`, or by a config of accelerate that only its state tells of."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for stage in (0, 1, 2, 3):
        plugin = SimpleNamespace(zero_stage=stage)
        chosen = SimpleNamespace(
            is_fsdp2=False, distributed_type="X", state=SimpleNamespace(deepspeed_plugin=plugin)
        )
        if stage < 3:
            refuse_zero3(plugin)
            require_fsdp2(arguments, chosen)
            continue
        with pytest.raises(ConfigError, match=r"ZeRO stage 3, .* expected stage 2 or less"):
            refuse_zero3(plugin)
        with pytest.raises(ConfigError, match=r"ZeRO stage 3, .* expected stage 2 or less"):
            require_fsdp2(arguments, chosen)
    refuse_zero3(None)


@pytest.mark.parametrize("experts", ["shared", "per_teacher"])
def test_a_sharded_model_learns_as_a_whole_one(digits, tmp_path, experts):
    """FSDP2 gathers the pieces again in backward only for tensors that it finds in the output."""
    keys = ("distill.summary_weight=0.5", f"student.mole.experts={experts}")
    config = digits.config("distill", *keys)
    gradients = {}
    for kind in ("whole", "sharded"):
        model, _, dataset, collator = digits.parts(config)
        batch = collator([dataset[at] for at in range(3)])
        batch.pop("keys")
        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / kind}", rank=0, world_size=1
        )
        try:
            if kind == "sharded":
                fully_shard(model)
            loss, _ = step_loss(model(**batch), count_units(batch), world_size=1)
            loss.backward()
        finally:
            distributed.destroy_process_group()
        gradients[kind] = {
            name: getattr(p.grad, "_local_tensor", p.grad)
            for name, p in model.named_parameters()
            if p.requires_grad and p.grad is not None
        }
    assert gradients["whole"].keys() == gradients["sharded"].keys()
    for name, gradient in gradients["whole"].items():
        torch.testing.assert_close(gradients["sharded"][name], gradient)


def test_a_model_in_pieces_is_saved_whole(digits, tmp_path):
    model, *_ = digits.parts(digits.config("distill"))
    save_parts(tmp_path / "whole", model.vlm, ["mole", "vision_tower"])
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        for layer in model.vlm.model.vision_tower.encoder.layers:
            fully_shard(layer)
        fully_shard(model)
        names = {n for n, p in model.named_parameters() if hasattr(p, "full_tensor")}
        assert len(names) == len(list(model.parameters()))
        gather_parameters(model)
        save_parts(tmp_path / "gathered", model.vlm, ["mole", "vision_tower"])
    finally:
        distributed.destroy_process_group()
    for name in ("mole_encoder.safetensors", "vision_tower.safetensors"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "gathered" / name).read_bytes() == expected


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_has_the_state_of_every_parameter_and_nothing_else_changes(optimizer):
    keys = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    learned, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [learned], "lr": 0.5}, {"params": [unused], "lr": 0.25}]
    made = optimizer(groups, weight_decay=0.1, **keys)
    complete_optimizer_state(made)
    assert not made.state  # no step yet
    learned.grad = torch.ones(2)
    made.step()
    before, kept = learned.detach().clone(), {k: v.clone() for k, v in made.state[learned].items()}
    complete_optimizer_state(made)
    assert made.state[unused].keys() == kept.keys()
    assert torch.equal(learned, before)
    assert torch.equal(unused, torch.ones(2))
    assert all(torch.equal(made.state[learned][key], value) for key, value in kept.items())
    assert [group["lr"] for group in made.param_groups] == [0.5, 0.25]
    assert torch.equal(learned.grad, torch.ones(2))
    assert unused.grad is None


def test_the_shipped_files_are_what_accelerate_and_deepspeed_read():
    config = load_config_from_file(str(FILES / "fsdp2.yaml"))
    assert str(config.distributed_type).endswith("FSDP")
    assert config.fsdp_config["fsdp_version"] == 2
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert wrapped == ["LlamaDecoderLayer", "CLIPEncoderLayer"]
    for name in ("fsdp2.yaml", "README.md"):
        assert "ntested" in (FILES / name).read_text()
    assert yaml.safe_load((FILES / "fsdp2.yaml").read_text())["use_cpu"] is False
    stages = json.loads((FILES / "deepspeed_zero2.json").read_text())
    assert stages["zero_optimization"]["stage"] == 2


def test_the_classes_that_are_wrapped_are_in_the_model(digits):
    model, *_ = digits.parts(digits.config())
    names = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer"} <= names
    assert isinstance(model, torch.nn.Module)
