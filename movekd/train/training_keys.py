"""Ranges of the keys of `training:`, which become transformers.TrainingArguments.

transformers checks few values: it trains with NaN for a learning rate, and for no epoch at all.
Keys that are not listed here are for transformers to judge (see ``training_args``).
"""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from movekd.config import Integer, Number, Text, problems

_OURS = (
    *("output_dir", "remove_unused_columns", "resume_from_checkpoint"),
    "logging_nan_inf_filter",
)
"""Keys that `movekd train` sets itself."""


def _steps_or_epochs(steps: int) -> int:
    if steps != -1 and steps < 1:
        raise ValueError("expected 1 or more steps, or -1 to count num_train_epochs")
    return steps


Flag = Annotated[bool, Field(strict=True)]
Seed = Annotated[Integer, Field(ge=0, lt=2**32)]
Count = Annotated[Integer, Field(ge=1, lt=2**31)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0, le=1e9)]
Settings = dict[str, Any] | Text | None
NotNegative = Annotated[Number, Field(ge=0, le=1e9)]


class TrainingKeys(TypedDict, total=False):
    """Types and ranges of the arguments that a run reads."""

    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    num_train_epochs: Positive
    max_steps: Annotated[Integer, Field(lt=2**31), AfterValidator(_steps_or_epochs)]
    learning_rate: Annotated[Number, Field(ge=0, le=1e4)]  # 0 measures without learning
    warmup_steps: NotNegative
    weight_decay: Annotated[Number, Field(ge=0, le=1e4)]
    adam_beta1: Share
    adam_beta2: Share
    adam_epsilon: Annotated[Number, Field(gt=0, le=1)]
    max_grad_norm: NotNegative
    label_smoothing_factor: Share
    neftune_noise_alpha: NotNegative | None
    seed: Seed
    data_seed: Seed | None
    logging_steps: Positive
    save_steps: Positive
    save_total_limit: Count | None
    eval_strategy: Literal["no", "steps", "epoch", False]
    eval_steps: Positive | None
    eval_on_start: Flag
    per_device_eval_batch_size: Count
    load_best_model_at_end: Flag
    metric_for_best_model: Text | None
    greater_is_better: Flag | None
    dataloader_num_workers: Annotated[Integer, Field(ge=0, le=4096)]
    dataloader_prefetch_factor: Annotated[Integer, Field(ge=1, le=10_000)] | None
    ddp_timeout: Count
    ddp_bucket_cap_mb: Count | None
    torch_empty_cache_steps: Count | None
    bf16: Flag
    fp16: Flag
    use_cpu: Flag
    gradient_checkpointing: Flag | None
    activation_checkpointing: Flag | None
    full_determinism: Flag
    logging_first_step: Flag
    dataloader_drop_last: Flag
    dataloader_pin_memory: Flag
    dataloader_persistent_workers: Flag
    ignore_data_skip: Flag
    # of other types: transformers opens True as the file with the number 1
    accelerator_config: Settings
    deepspeed: Settings
    fsdp_config: Settings
    lr_scheduler_kwargs: Settings
    activation_checkpointing_kwargs: Settings
    gradient_checkpointing_kwargs: Settings


_KEYS = TypeAdapter(with_config(ConfigDict(extra="allow"))(TrainingKeys))


def check_training_keys(training: dict[str, Any]) -> dict[str, Any]:
    """Return the keys as they are given, after holding them against their ranges.

    Raises:
        ValueError: names the wrong keys, or a key that the command line sets.
    """
    for key in _OURS:
        if key in training:
            raise ValueError(f"'{key}' is set by movekd train, not here")
    try:
        _KEYS.validate_python(training)
    except ValidationError as error:
        raise ValueError(problems(BaseModel, error)) from None
    for key, value in training.items():
        if not _is_plain(key) or not _is_plain(value):
            raise ValueError(
                f"{key}: expected finite numbers below 2**63 and text without NUL in it"
            )
    return training


def _is_plain(value: Any) -> bool:
    """Return whether all scalars in a value can be written, and passed on, as they are."""
    if isinstance(value, dict):
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return "\0" not in value and len(value) <= 4096
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) < value < 2**63
