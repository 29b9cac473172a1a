"""Ranges of the keys of `training:`, which become transformers.TrainingArguments.

transformers checks few values: it trains with NaN for a learning rate, and for no epoch at all.
Keys that are not listed here are for transformers to judge (see ``training_args``). The learning
rates of parts, which it does not know, are here too.
"""

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from movekd.config import FrozenModel, Integer, Number, Text, problems
from movekd.errors import ConfigError, shorten

_OURS = (
    *("output_dir", "remove_unused_columns", "resume_from_checkpoint"),
    "logging_nan_inf_filter",
)
"""Keys that `movekd train` sets itself."""

_ELSEWHERE = {
    "learning_rates": "stands at the top level of student.yaml, beside trained: `learning_rates: "
    "{{projector: 2e-5}}`",
    "mm_projector_lr": "is LLaVA's name of it; write `learning_rates: {{projector: {value}}}` at "
    "the top level of student.yaml",
    "mm_vision_tower_lr": "is LLaVA's name of it; write `learning_rates: {{vision_tower: {value}, "
    "mole: {value}}}` at the top level of student.yaml (mole: the experts in the tower)",
    "group_by_length": "is not known here; data.group_by_modality_length groups samples by kind "
    "and length",
}
"""Keys that users look for in `training:` -> where they are."""

_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "use_liger_kernel": (
        False,
        "transformers puts Liger's kernels only into its own model classes, and a run trains the "
        "student with its heads, which it would leave as they are. Liger's loss of a LLaVA also "
        "gives no logits, which loss terms may read. torch_compile and "
        "student.attn_implementation save time here",
    ),
    "label_smoothing_factor": (
        0,
        "the text loss is LLaVA's cross entropy, summed over answer tokens, and has no smoothing",
    ),
    "neftune_noise_alpha": (None, "the trainer adds no noise to embeddings"),
    "train_sampling_strategy": (
        "random",
        "the order of samples is movekd's own, so that a resumed run sees the same; "
        "data.group_by_modality_length groups samples by kind and length",
    ),
}
"""Keys that a run would not heed -> the value that they must have, and why."""


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
Rate = Annotated[Number, Field(ge=0, le=1e4)]
"""A learning rate; 0 measures without learning."""


class LearningRates(FrozenModel):
    """Learning rates of parts. Null: that of `training.learning_rate`."""

    mole: Rate | None = Field(default=None, description="Experts and routers.")
    projector: Rate | None = Field(
        default=None, description="Projector; LLaVA's `mm_projector_lr`."
    )
    vision_tower: Rate | None = Field(
        default=None, description="Weights of the vision tower without its experts."
    )
    language_model: Rate | None = Field(
        default=None, description="What learns of the language model: its weights, or their LoRA."
    )
    heads: Rate | None = Field(default=None, description="Teacher adapters or student heads.")

    def given(self) -> dict[str, float]:
        """Return the rates that are not null, by part."""
        return {part: rate for part, rate in self if rate is not None}


def check_learning_rates(
    rates: LearningRates | None, trained: Sequence[str], *, has_heads: bool
) -> None:
    """Refuse a learning rate of a part that does not learn.

    Args:
        rates: those of the run.
        trained: parts that learn.
        has_heads: whether the run has teacher adapters or student heads, which always learn.

    Raises:
        ConfigError: names the part, and those that learn.
    """
    learning = [*trained, *(["heads"] if has_heads else [])]
    for part, rate in (rates.given() if rates is not None else {}).items():
        if part not in learning:
            hint = f", or add '{part}' to trained" if part != "heads" else ""
            raise ConfigError(
                f"learning_rates.{part} is {rate:g}, but {part} "
                f"{'do' if part == 'heads' else 'does'} not learn in this run; expected rates of "
                f"{', '.join(learning)}. Take it out{hint}."
            )


def _not_reentrant(value: bool) -> bool:
    if value:
        raise ValueError(
            "expected false: reentrant checkpointing loses the gradients of blocks whose input "
            "needs none, such as those of a tower with frozen embeddings"
        )
    return value


@with_config(ConfigDict(extra="forbid"))
class CheckpointingKeys(TypedDict, total=False):
    """How activations are computed again in backward."""

    use_reentrant: Annotated[Flag, AfterValidator(_not_reentrant)]
    every_n_layers: Annotated[Integer, Field(ge=1, le=10_000)]
    offload: Flag
    preserve_rng_state: Flag
    determinism_check: Literal["default", "none"]
    early_stop: Flag
    debug: Flag


def _read_json(value: Any) -> Any:
    """Return what transformers reads from text: JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("expected a mapping, or one as JSON") from None


Checkpointing = Annotated[CheckpointingKeys | None, BeforeValidator(_read_json)]


class TrainingKeys(TypedDict, total=False):
    """Types and ranges of the arguments that a run reads."""

    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    num_train_epochs: Positive
    max_steps: Annotated[Integer, Field(lt=2**31), AfterValidator(_steps_or_epochs)]
    learning_rate: Rate
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
    optim_args: Text | None
    activation_checkpointing_kwargs: Checkpointing
    gradient_checkpointing_kwargs: Checkpointing


_KEYS = TypeAdapter(with_config(ConfigDict(extra="allow"))(TrainingKeys))


def check_training_keys(training: dict[str, Any]) -> dict[str, Any]:
    """Return the keys as they are given, after holding them against their ranges.

    Raises:
        ValueError: names the wrong keys, or a key that the command line sets.
    """
    for key in _OURS:
        if key in training:
            raise ValueError(f"'{key}' is set by movekd train, not here")
    for key, where in _ELSEWHERE.items():
        if key in training:
            value = shorten(training[key], 40)
            raise ValueError(f"training.{key} {where.format(value=value)}")
    try:
        _KEYS.validate_python(training)
    except ValidationError as error:
        raise ValueError(problems(BaseModel, error)) from None
    for key, (value, why) in _WITHOUT_EFFECT.items():
        if training.get(key, value) != value:
            found = shorten(repr(training[key]), 40)
            raise ValueError(f"training.{key} is {found}, and would change nothing: {why}")
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
