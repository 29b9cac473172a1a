"""Check how FSDP2 or DeepSpeed shards the model, and gather what FSDP2 has sharded.

Used by ``run`` and ``trainer``. FSDP2 has not been run on several GPUs yet; its files are in
pipelines/accelerate. What two processes on a CPU show is in tests/train/test_fully_shard.py.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import TrainingArguments

from movekd.errors import ConfigError


def is_fsdp_asked_for(arguments: TrainingArguments) -> bool:
    """Return whether `training.fsdp` or `accelerate launch` asks to shard the model."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return launched or bool(arguments.fsdp)


def refuse_fsdp_on_cpu(arguments: TrainingArguments) -> None:
    """Refuse FSDP on a CPU, where accelerate would silently use DDP instead.

    Raises:
        ConfigError: FSDP is asked for on a CPU.
    """
    if is_fsdp_asked_for(arguments) and arguments.device.type == "cpu":
        raise ConfigError(
            "FSDP2 was asked for, but this run is on a CPU: accelerate enables FSDP on "
            "accelerators only and would silently train with DDP. Run it on GPUs, or with torchrun "
            "and without training.fsdp."
        )


def refuse_zero3(plugin: Any) -> None:
    """Refuse ZeRO-3, whose pieces of parameters nothing here gathers for the files of a run.

    Args:
        plugin: accelerate's DeepSpeedPlugin, or None.

    Raises:
        ConfigError: names the stage.
    """
    if plugin is not None and plugin.zero_stage == 3:
        raise ConfigError(
            "the config of DeepSpeed sets ZeRO stage 3, which cuts parameters into pieces that "
            "`movekd train` cannot load or save; expected stage 2 or less, as in "
            "pipelines/accelerate/deepspeed_zero2.json. To divide parameters too, use FSDP2."
        )


def require_fsdp2(arguments: TrainingArguments, accelerator: Any) -> None:
    """Refuse a run that asks for FSDP and whose model is not sharded by FSDP2, and ZeRO-3.

    Raises:
        ConfigError: names what accelerate chose instead.
    """
    refuse_zero3(getattr(accelerator.state, "deepspeed_plugin", None))
    if is_fsdp_asked_for(arguments) and not accelerator.is_fsdp2:
        raise ConfigError(
            f"FSDP was asked for, and accelerate chose {accelerator.distributed_type}; expected "
            "FSDP of version 2. Set fsdp_version: 2 and several processes, as in "
            "pipelines/accelerate/fsdp2.yaml."
        )


def gather_parameters(model: nn.Module) -> None:
    """Gather the parameters that FSDP2 has sharded; every rank must call this."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def complete_optimizer_state(optimizer: Optimizer) -> None:
    """Give parameters that never had a gradient the state of a step with gradient 0 and rate 0.

    The tower's last block learns nothing where its output is not used. torch refuses to load a
    gathered optimizer that lacks the state of a parameter with ``requires_grad``. Call this in
    every rank, between two steps.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    missing = [p for p in parameters if not optimizer.state.get(p)]
    if len(missing) in (0, len(parameters)):  # all: an optimizer without state, such as plain SGD
        return
    gradients, rates = [p.grad for p in parameters], [g["lr"] for g in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(r) if isinstance(r := group["lr"], torch.Tensor) else 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
