"""Refuse arguments that this machine or this model cannot do, before a run loads anything.

Input: the config and the TrainingArguments of a run. Used by ``training_args``. transformers finds
most of these only when it makes the optimizer, after minutes of loading, or trains without them.
"""

import copy
import importlib
import inspect
import os
import shutil
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from movekd.errors import ConfigError, did_you_mean, shorten
from movekd.train.config import TrainConfig

_READS_MODEL = ("galore", "apollo", "lomo")
"""In names of optimizers that choose their parameters from the model; a run makes them later."""
_OWN_GROUPS = ("lomo", "layerwise")
"""In names of optimizers whose groups decide nothing."""
_UNKNOWN_STEPS = 10_000
"""Steps of a schedule that is only tried, if the run counts epochs."""


def require_possible(config: TrainConfig, arguments: TrainingArguments) -> None:
    """Refuse a run whose arguments this machine or this model cannot do.

    Raises:
        ConfigError: names the argument, the reason, and what to write instead.
    """
    _check_trackers(arguments)
    _check_attention(config, arguments)
    _check_compilation(arguments)
    _check_checkpointing(arguments)
    _check_optimizer(arguments)
    _check_schedule(arguments)
    if config.learning_rates is not None and config.learning_rates.given():
        _check_groups(arguments)


def _check_trackers(arguments: TrainingArguments) -> None:
    for name in map(str, arguments.report_to):
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigError(
                f"training.report_to names {shorten(repr(name), 80)}; expected none, or some of "
                f"{known}.{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
            )
        if name != "flyte" and name not in get_available_reporting_integrations():
            raise ConfigError(
                f"training.report_to names '{name}', whose package is not installed; expected it "
                f"in this Python. Install it (say, pip install {name.replace('_', '-')}), or set "
                "training.report_to: tensorboard, or none."
            )
    if "wandb" in arguments.report_to and arguments.process_index == 0:
        _check_wandb()


def _check_wandb() -> None:
    """Refuse a run that would stop at its first step, because wandb has no key and cannot ask."""
    if os.environ.get("WANDB_MODE", "online") != "online" or sys.stdin.isatty():
        return
    login: Any = importlib.import_module("wandb").login
    if "prompt" in inspect.signature(login).parameters and not login(prompt=False):
        raise ConfigError(
            "training.report_to names 'wandb', which has no API key here and cannot ask for one; "
            "expected a login. Run `wandb login`, set $WANDB_API_KEY, or set WANDB_MODE=offline."
        )


def _check_attention(config: TrainConfig, arguments: TrainingArguments) -> None:
    if config.student.attn_implementation != "flash_attention_2":
        return
    found = []
    if arguments.device.type == "cpu":
        found.append("this run is on a CPU")
    if find_spec("flash_attn") is None:
        found.append("the package flash-attn is not installed")
    if config.student.dtype == "float32" and not (arguments.bf16 or arguments.fp16):
        found.append("this run computes in float32")
    if found:
        raise ConfigError(
            f"student.attn_implementation is flash_attention_2, but {' and '.join(found)}; it "
            "needs a GPU, its package, and training.bf16: true. Set attn_implementation: sdpa, "
            "which takes PyTorch's own flash attention where it can."
        )


def _check_compilation(arguments: TrainingArguments) -> None:
    if not arguments.torch_compile:
        return
    backend = str(arguments.torch_compile_backend)
    known = [each.value.lower() for each in DynamoBackend if each != DynamoBackend.NO]
    if backend not in known:
        raise ConfigError(
            f"training.torch_compile_backend is {shorten(repr(backend), 80)}; expected one of "
            f"{', '.join(known)}.{did_you_mean(backend, known)}"
        )
    on_cpu = arguments.device.type == "cpu"
    variable, names = ("CXX", ["g++"]) if on_cpu else ("CC", ["gcc", "clang"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if backend == "inductor" and not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"training.torch_compile builds kernels with {' or '.join(names)}, which is not "
            f"installed; expected a compiler. Install one (Debian: apt install g++), name it in "
            f"${variable}, or leave torch_compile out."
        )


def _check_checkpointing(arguments: TrainingArguments) -> None:
    keys = arguments.gradient_checkpointing_kwargs or {}
    if keys.get("offload") and arguments.device.type == "cpu":
        raise ConfigError(
            "training.activation_checkpointing_kwargs asks to offload activations to the memory of "
            "the host, where a run on a CPU has them already; leave offload out."
        )


def _check_optimizer(arguments: TrainingArguments) -> None:
    """Make the optimizer of one small parameter, with and without each of its arguments."""
    name = arguments.optim.value
    given = (arguments.optim_args or "").replace(" ", "")
    pairs = given.split(",") if given else []
    if wrong := [pair for pair in pairs if pair.count("=") != 1]:
        raise ConfigError(
            f"training.optim_args holds {shorten(repr(wrong[0]), 80)}; expected pairs, as in "
            "'momentum=0.9,nesterov=true'."
        )
    if any(word in name for word in _READS_MODEL):
        return
    try:
        optimizer, keys = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
            optimizer([nn.Parameter(torch.zeros(2, 2))], **keys)
    except Exception as error:  # of the optimizer's package, too
        values = f" with optim_args {shorten(repr(given), 80)}" if given else ""
        raise ConfigError(
            f"training.optim is '{name}'{values}, which cannot be made: {_reason(error)}; expected "
            "an optimizer that is installed, and its arguments. Correct them, or take "
            "training.optim: adamw_torch."
        ) from None
    for pair in pairs:
        others = copy.copy(arguments)
        others.optim_args = ",".join(other for other in pairs if other != pair)
        if Trainer.get_optimizer_cls_and_kwargs(others)[1] == keys:
            raise ConfigError(
                f"training.optim_args holds {shorten(repr(pair), 80)}, which changes nothing of "
                f"optim '{name}'; expected an argument that it takes and has not by itself. "
                "Correct it, or take it out."
            )


def _check_schedule(arguments: TrainingArguments) -> None:
    """Make the schedule of one small parameter, and ask for its rate at some steps."""
    kind, keys = SchedulerType(arguments.lr_scheduler_type), arguments.lr_scheduler_kwargs
    said = f"training.lr_scheduler_kwargs is {shorten(keys, 200)}"
    if keys and kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        raise ConfigError(
            f"{said}, but lr_scheduler_type '{kind.value}' takes none; leave it out, or choose "
            "another schedule."
        )
    num_steps = arguments.max_steps if arguments.max_steps > 0 else _UNKNOWN_STEPS
    num_warmup = arguments.get_warmup_steps(num_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = get_scheduler(
                kind, optimizer, num_warmup, num_steps, scheduler_specific_kwargs=keys
            )
            for rate in getattr(schedule, "lr_lambdas", ()):
                for step in (0, num_warmup, num_steps // 2, num_steps - 1):
                    float(rate(step))
    except Exception as error:
        raise ConfigError(
            f"{said}, and lr_scheduler_type '{kind.value}' cannot be made: {_reason(error)}; "
            "expected the arguments that this schedule of transformers takes. Correct them."
        ) from None


def _check_groups(arguments: TrainingArguments) -> None:
    """Refuse learning rates of parts where parameter groups decide nothing."""
    name = arguments.optim.value
    plugin = arguments.deepspeed_plugin
    if any(word in name for word in _OWN_GROUPS):
        raise ConfigError(
            f"training.optim is '{name}', which takes one learning rate for all that learns; "
            "learning_rates needs another optimizer, such as adamw_torch."
        )
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ConfigError(
            "the config of DeepSpeed names its optimizer, which takes one learning rate for all "
            "that learns; take 'optimizer' out of that file, so that training.optim counts, or "
            "leave learning_rates out."
        )


def _reason(error: Exception) -> str:
    """Return the first line of an error without its period, or the error's kind."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 300).rstrip(".;: ") if lines else type(error).__name__
