"""Turn `training:` of a config into transformers.TrainingArguments, with movekd's defaults."""

from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from movekd.errors import ConfigError, did_you_mean
from movekd.train.config import TrainConfig
from movekd.train.evaluation_keys import SAVE_STEPS, evaluation_keys
from movekd.train.requirements import require_possible

OLDEST_TRANSFORMERS = "5.19"
"""Older versions silently divide the loss by the accumulation steps once more, and their LLaVA
drops the image features that it is given."""

_DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of the steps
    "num_train_epochs": 1,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "report_to": "tensorboard",
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}
"""Defaults of `training:`, from LLaVA's scripts where these set a value."""

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Old name -> new name, since about transformers 5.23, where the old names warn."""


def training_arguments(config: TrainConfig, output_dir: Path) -> TrainingArguments:
    """Return the arguments of a run.

    Raises:
        ConfigError: transformers does not take a key or value, its version computes another
            loss, or this machine or this model cannot do what the arguments say.
    """
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < tuple(int(part) for part in OLDEST_TRANSFORMERS.split(".")):
        raise ConfigError(
            f"transformers is {transformers.__version__}; expected {OLDEST_TRANSFORMERS} or newer, "
            "because older ones silently scale losses differently. Upgrade it."
        )
    fields = TrainingArguments.__dataclass_fields__
    has_accelerator = torch.accelerator.is_available()
    # torchrun would start P separate runs on CPUs without use_cpu
    by_device = {"use_cpu": not has_accelerator, "dataloader_pin_memory": has_accelerator}
    keys = _DEFAULTS | by_device | evaluation_keys(config)
    for key in ("save_strategy", "logging_strategy", "eval_strategy"):
        if keys.get(key) is False:  # YAML 1.1 reads `no` as false
            keys[key] = "no"
    for old, new in _RENAMED.items():
        have, want = (old, new) if new in fields else (new, old)
        if have in keys:
            keys[want] = keys.pop(have)
    for key, value in keys.items():
        if key not in fields:
            near = did_you_mean(key, fields)
            raise ConfigError(
                f"training.{key} is not an argument of transformers.TrainingArguments.{near}"
            )
        default = fields[key].default
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if default is not MISSING and is_number and not isinstance(value, int | float):
            raise ConfigError(f"training.{key} is {value!r}; expected a number like {default}.")
    if keys["report_to"] is None:  # YAML's null; transformers would look for a tracker None
        keys["report_to"] = "none"
    try:
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            remove_unused_columns=False,
            logging_nan_inf_filter=False,  # compute_loss stops at NaN and names the samples
            **keys,
        )
    except (
        *(TypeError, ValueError, RuntimeError, ImportError),
        *(KeyError, AttributeError, OverflowError, OSError),  # of a value of another type
    ) as error:
        reason = str(error).strip() or type(error).__name__
        raise ConfigError(
            f"training: {reason.splitlines()[0]} Expected arguments that "
            "transformers.TrainingArguments takes; correct them."
        ) from None
    require_possible(config, arguments)
    return arguments


def global_batch_size(arguments: TrainingArguments) -> int:
    """Return the samples per optimizer step, over all ranks."""
    at_once: int = arguments.train_batch_size * arguments.world_size
    return at_once * int(arguments.gradient_accumulation_steps)


def divide_step(config: TrainConfig, arguments: TrainingArguments, samples: int) -> TrainConfig:
    """Return the config with ``samples`` per step, divided over the present number of ranks.

    The batch of a rank grows no larger than the config says; accumulation steps take the rest.

    Args:
        config: the resolved run.
        arguments: its arguments in this number of ranks.
        samples: samples per optimizer step, over all ranks.

    Raises:
        ConfigError: the ranks cannot share the samples evenly.
    """
    most = int(arguments.per_device_train_batch_size)
    num_shares = arguments.world_size * int(arguments.train_batch_size) // most
    share, rest = divmod(samples, num_shares)
    if rest:
        raise ConfigError(
            f"the run was begun with {samples} samples per step, which {num_shares} "
            f"processes cannot share evenly. Resume it with a number of processes that divides "
            f"{samples}."
        )
    size = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
    return config.model_copy(update={"training": config.training | keys})
