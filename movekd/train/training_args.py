"""`training:` of a config -> transformers.TrainingArguments, with this project's defaults."""

from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from movekd.errors import ConfigError, did_you_mean
from movekd.train.config import TrainConfig

OLDEST_TRANSFORMERS = "5.19"
"""Before it, Trainer divides by the accumulation steps once more, and LLaVA drops the image
features that it is handed; neither says so."""

_DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of the steps
    "num_train_epochs": 1,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "tensorboard",
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}
"""What `training:` leaves out. As in LLaVA's scripts where those say something."""

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names until transformers 5.22 or so; where the new ones exist, the old ones warn."""


def training_arguments(config: TrainConfig, output_dir: Path) -> TrainingArguments:
    """Return the arguments of a run.

    Raises:
        ConfigError: a key or value that transformers does not take, or a version of it that would
            train something else.
    """
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < tuple(int(part) for part in OLDEST_TRANSFORMERS.split(".")):
        raise ConfigError(
            f"transformers is {transformers.__version__}; expected {OLDEST_TRANSFORMERS} or newer, "
            "because older ones scale losses differently without a word. Upgrade it."
        )
    fields = TrainingArguments.__dataclass_fields__
    keys = _DEFAULTS | config.training
    for old, new in _RENAMED.items():
        if old in keys and new in fields:
            keys[new] = keys.pop(old)
    has_accelerator = torch.accelerator.is_available()
    for key, value in keys.items():
        if key not in fields:
            near = did_you_mean(key, fields)
            raise ConfigError(
                f"training.{key} is no argument of transformers.TrainingArguments.{near}"
            )
        default = fields[key].default
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if default is not MISSING and is_number and not isinstance(value, int | float):
            raise ConfigError(f"training.{key} is {value!r}; expected a number like {default}.")
    if keys.get("do_eval") or str(keys.get("eval_strategy", "no")) != "no":
        raise ConfigError(
            "training.eval_strategy asks for evaluation during the run, which has no data for it; "
            "leave it out, and run `movekd evaluate` on the result."
        )
    try:
        return TrainingArguments(
            output_dir=str(output_dir),
            remove_unused_columns=False,
            dataloader_pin_memory=keys.pop("dataloader_pin_memory", has_accelerator),
            use_cpu=keys.pop("use_cpu", not has_accelerator),  # or torchrun runs P runs of one
            logging_nan_inf_filter=False,  # compute_loss stops at such a loss and says where
            **keys,
        )
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"training: {_first_line(error)}") from None


def global_batch_size(arguments: TrainingArguments) -> int:
    """Return the samples of one optimizer step, over all processes."""
    at_once: int = arguments.train_batch_size * arguments.world_size
    return at_once * int(arguments.gradient_accumulation_steps)


def divide_step(config: TrainConfig, arguments: TrainingArguments, samples: int) -> TrainConfig:
    """Return the config with ``samples`` a step, divided over the processes that there are now.

    No process sees more at once than the config says; what is over becomes accumulation steps.

    Args:
        config: the resolved run.
        arguments: what it is in this number of processes.
        samples: of one optimizer step, over all processes.

    Raises:
        ConfigError: the processes cannot share them evenly.
    """
    most = int(arguments.per_device_train_batch_size)
    num_shares = arguments.world_size * int(arguments.train_batch_size) // most
    share, rest = divmod(samples, num_shares)
    if rest:
        raise ConfigError(
            f"the run was begun with {samples} samples a step, which {num_shares} processes cannot "
            f"share evenly. Go on with a number of processes that divides {samples}."
        )
    size = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
    return config.model_copy(update={"training": config.training | keys})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
