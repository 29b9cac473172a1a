"""Read student.yaml, which describes one training run, check it and fill in its defaults.

Input: YAML and ``--set a.b=c``. Output: a ``TrainConfig`` for all of pipeline 2, which is also
written beside the results. ``recipe`` sets the defaults of the keys in which the released code
(``official``) and this project (``revised``) differ.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from movekd.config import FilePath, FrozenModel, Text, read_yaml, validate
from movekd.distill.config import (
    WITH_ANCHOR_SHARE,
    DistillConfig,
    check_distill,
    fill,
    fill_distill,
)
from movekd.distill.loss_terms import read_loss_terms
from movekd.distill.weighting import ANCHOR_SHARE
from movekd.errors import ConfigError, shorten
from movekd.files.reading import parse_yaml
from movekd.student.config import Recipe, StudentConfig
from movekd.train.data_keys import DataConfig
from movekd.train.evaluation_keys import evaluation_keys
from movekd.train.expert_keys import check_experts, fill_teachers
from movekd.train.language_model_keys import check_language_model_keys
from movekd.train.packing_keys import check_packing_keys
from movekd.train.recipes import RECIPES, keep_values, mole_defaults
from movekd.train.trained_keys import ENCODER_PARTS, Part, Stage, fill_trained
from movekd.train.training_keys import (
    LearningRates,
    check_learning_rates,
    check_training_keys,
)


class TrainConfig(FrozenModel):
    """One run."""

    recipe: Recipe = Field(
        description="Set of defaults: official as released, revised as this project's."
    )
    stage: Stage = Field(
        description="pretrain (stage 1) or finetune (stage 2); distill trains only the encoder, on "
        "cached targets, without a language model."
    )
    student: StudentConfig
    distill: DistillConfig | None = Field(
        default=None, description="Null trains without distillation."
    )
    loss_terms: dict[Text, dict[str, Any]] = Field(
        default_factory=dict,
        max_length=64,
        description="Further loss terms, by the name they were registered under: "
        "`{name: {weight: 0.1}}`.",
    )
    data: DataConfig
    init_from: FilePath | None = Field(
        default=None, description="Output of an earlier stage, whose weights to start from."
    )
    trained: list[Part] | None = Field(
        default=None,
        min_length=1,
        description="Parts that learn. Null: mole and projector in pretrain (with revised "
        "vision_tower as well, at its own rate), all in finetune, mole in distill (vision_tower if "
        "mole is null).",
    )
    learning_rates: LearningRates | None = Field(
        default=None,
        description="Learning rates of parts; the others learn at `training.learning_rate`. All "
        "follow the same schedule. revised, in pretrain, if trained is null: vision_tower 1e-4.",
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of transformers.TrainingArguments."
    )

    @field_validator("training")
    @classmethod
    def _check_training(cls, training: dict[str, Any]) -> dict[str, Any]:
        return check_training_keys({key: _number(value) for key, value in training.items()})

    def resolved(self) -> "TrainConfig":
        """Return the same run with every key of the recipe and the stage filled in."""
        defaults = RECIPES[self.recipe]
        is_finetune = self.stage == "finetune"
        student, distill = self.student, self.distill
        if student.mole is not None:
            mole = fill(student.mole, mole_defaults(self.recipe, student.mole.r))
            student = student.model_copy(update={"mole": fill_teachers(mole, distill)})
        if distill is not None:
            distill = fill_distill(distill, defaults["distill"])
            if distill.teacher_weighting in WITH_ANCHOR_SHARE:
                distill = fill(distill, {"anchor_share": ANCHOR_SHARE})
        student = fill(student, {"prompt": "v1" if is_finetune else "plain"})
        if self.stage == "distill":
            student = student.model_copy(update={"language_model": None})
        geometry = "stretch" if student.architecture == "llava_next" else "crop"
        is_grouped = is_finetune and not self.data.packing
        data = fill(self.data, {"geometry": geometry, "group_by_modality_length": is_grouped})
        trained, rates = fill_trained(
            self.stage,
            self.recipe,
            self.trained,
            self.learning_rates,
            has_experts=student.mole is not None,
        )
        terms = read_loss_terms(self.loss_terms, has_targets=self.distill is not None)
        update = {
            "student": student,
            "distill": distill,
            "loss_terms": {name: keys.model_dump(mode="json") for name, keys in terms.items()},
            "data": data,
            "trained": trained,
            "learning_rates": rates,
        }
        return self.model_copy(update=update)

    def to_yaml(self) -> str:
        """Return this run as YAML, as ``load_config`` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(
    path: Path,
    overrides: list[str] | None = None,
    *,
    begun: dict[str, Any] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> TrainConfig:
    """Return the resolved run of a YAML file and ``a.b=c`` overrides.

    A relative path may start beside the YAML file or in the working directory; hub ids stay as
    they are.

    Args:
        path: the YAML file.
        overrides: what `--set` gives.
        begun: config.yaml of the run that is resumed; its values stand where the recipe sets one.
        notify: called with a line per value that the recipe sets differently today.

    Raises:
        ConfigError: a wrong key or value, named with the nearest right one.
    """
    content = read_yaml(path)
    for override in overrides or []:
        _override(content, override)
    validate(TrainConfig, content, str(path))  # so that what is looked for on the disk is a path
    _resolve_paths(content, path.parent)
    for line in keep_values(content, begun or {}):
        notify(line)
    config = validate(TrainConfig, content, str(path)).resolved()
    _check(config)
    return config


def _check(config: TrainConfig) -> None:
    """Refuse combinations of keys that cannot train."""
    distill, student = config.distill, config.student
    if student.dtype == "float16":
        raise ConfigError(
            "student.dtype is float16, in which small gradients vanish; set float32 (with "
            "training.bf16: true to compute in bfloat16), or bfloat16."
        )
    if config.stage == "distill":
        _check_encoder_only(config)
    elif student.language_model is None:
        raise ConfigError(
            f"key 'student.language_model' is missing; stage {config.stage} needs a hub id or a "
            "directory there. Only stage: distill needs none."
        )
    check_language_model_keys(config)
    check_packing_keys(config)
    if "mole" in (config.trained or []) and student.mole is None:
        raise ConfigError(
            "trained names 'mole', but student.mole is null; set student.mole, or take 'mole' out "
            "of trained."
        )
    has_heads = distill is not None and (
        distill.adapters == "student"
        or set(distill.teachers) != {distill.anchor}
        or distill.summary_weight > 0
    )
    check_learning_rates(config.learning_rates, config.trained or [], has_heads=has_heads)
    if student.architecture == "llava_next" and config.data.geometry != "stretch":
        raise ConfigError(
            f"data.geometry is '{config.data.geometry}', but the base view of "
            "student.architecture: llava_next is the whole image, stretched. Set data.geometry: "
            "stretch, or leave it out."
        )
    evaluation_keys(config)
    check_experts(config)
    if distill is None:
        return
    if distill.views == "all" and student.architecture == "llava" and config.stage != "distill":
        raise ConfigError(
            "distill.views is 'all', but student.architecture: llava looks only at "
            "the whole image. Set architecture: llava_next, or views: base."
        )
    check_distill(distill, config.loss_terms)


def _check_encoder_only(config: TrainConfig) -> None:
    """Refuse keys that mean nothing without a language model."""
    if config.distill is None:
        raise ConfigError(
            "stage: distill learns only from cached targets, but distill is null; name "
            "distill.teachers, or choose stage: pretrain."
        )
    others = [part for part in config.trained or [] if part not in ENCODER_PARTS]
    if others:
        raise ConfigError(
            f"trained names {', '.join(others)}, which stage: distill does not have; it trains "
            f"{' and '.join(ENCODER_PARTS)}."
        )
    if any(source.conversations for source in config.data.all_sources()):
        raise ConfigError(
            "data.conversations is given, but stage: distill takes every image of data.shards and "
            "reads no text; leave it out, or pack those images into other shards."
        )
    if config.data.group_by_modality_length:
        raise ConfigError(
            "data.group_by_modality_length groups samples by their text, and stage: distill reads "
            "none; leave it out."
        )


def _number(value: Any) -> Any:
    """Return `2e-5` as a number; YAML 1.1 reads it as text, because it has no dot."""
    pattern = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"
    is_number = isinstance(value, str) and len(value) < 64 and re.fullmatch(pattern, value)
    return float(value) if is_number else value


def _override(content: dict[str, Any], override: str) -> None:
    """Set one ``a.b=c`` in the YAML's content; c is read as YAML."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {shorten(repr(override))} is not of the form a.b=c.")
    *parents, last = key.split(".")
    if len(parents) > _MAX_PARENTS:
        raise ConfigError(
            f"--set {shorten(key)} has {len(parents) + 1} parts; expected at most "
            f"{_MAX_PARENTS + 1}, as in student.mole.r=16."
        )
    for parent in parents:
        inner = content.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = content[parent] = {}
        content = inner
    content[last] = parse_yaml(value, f"--set {shorten(override)}")


_MAX_PARENTS = 7
"""Most dots in the key of an override; the deepest keys have three."""


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Make paths absolute that exist beside the YAML file or in the working directory."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):  # one of data.sources; its weight is no text
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, str):
            for path in (folder / value, Path(value)):
                if path.exists():
                    return str(path.resolve())
        return value

    for section, keys in (
        ("student", ("vision_tower", "language_model")),
        ("data", ("shards", "conversations", "eval_conversations", "sources", "probe_images")),
    ):
        part = content.get(section)
        if isinstance(part, dict):
            part.update({key: resolve(part[key]) for key in keys if key in part})
    if "init_from" in content:
        content["init_from"] = resolve(content["init_from"])
