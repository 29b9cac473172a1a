"""One training run, from a resolved config to a model that `evaluate` and `ask` load.

    OUTPUT/
      config.yaml       the run, every default filled in
      log.json          every logged step, when the run has ended
      checkpoint-N/     Trainer's, for --resume
      runs/             TensorBoard
      model/            what this run ends with (see student.files)

No teacher is loaded here, and no teacher code imported: targets come from the cache.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from movekd.cache.reader import FeatureCache, open_cache
from movekd.config import read_yaml
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, ConfigError, did_you_mean
from movekd.student.files import (
    CONFIG_FILE,
    PART_FILES,
    load_adapters,
    load_parts,
    part_of,
    save_adapters,
    save_parts,
    save_tokenizer,
)
from movekd.student.vlm import Student, build_vlm
from movekd.train.config import TrainConfig
from movekd.train.data import Collator, ConversationDataset, read_conversations
from movekd.train.model import DistillModel, check_targets
from movekd.train.trainer import CHECKPOINT_FILE, DistillTrainer

LOG_FILE = "log.json"
Progress = Callable[[str, int, int], None]

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


@dataclass(frozen=True)
class TrainSummary:
    """What a run ended with."""

    output_dir: Path
    steps: int
    seconds: float
    log: list[dict[str, float]]
    """Every logged step, in order."""


def train(
    config: TrainConfig,
    output_dir: Path,
    cache_url: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_random_teachers: bool = False,
    progress: Progress | None = None,
) -> TrainSummary:
    """Train to the end, and save the model.

    Interrupted and resumed, a run ends with the weights of an uninterrupted one, bit for bit on
    CPU.

    Args:
        config: the resolved run.
        output_dir: where everything goes.
        cache_url: the feature cache, a folder or URL; needed where the config distils.
        resume: go on from the last checkpoint in ``output_dir``.
        overwrite: delete an earlier run in ``output_dir``.
        allow_random_teachers: take targets of teachers with random weights (tests, benchmarks).
        progress: called with what is being done, steps done, steps in all.

    Raises:
        MovekdError: config, corpus and cache do not fit each other; says which key differs.
        TrainingError: the loss is no longer a number.
    """
    checkpoint = _prepare_output(config, output_dir, resume=resume, overwrite=overwrite)
    corpus = open_corpus(config.data.shards)
    cache = _open_targets(config, cache_url, allow_random_teachers)
    arguments = _training_arguments(config, output_dir)
    set_seed(arguments.seed)
    model, student = build_model(config, cache)
    assert config.student.prompt is not None
    dataset = ConversationDataset(
        read_conversations(config.data, corpus),
        corpus,
        cache,
        [] if config.distill is None else config.distill.teachers,
        student,
        config.student.prompt,
        config.data.model_max_length,
    )
    collator = Collator(
        corpus,
        student.image_transform(config.data.geometry),
        cache,
        () if config.distill is None else tuple(config.distill.teachers),
        student.tokenizer.pad_token_id,
    )
    if arguments.should_save:
        if overwrite:  # not before all the rest was found to fit
            shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    trainer = DistillTrainer(config, model, dataset, collator, args=arguments)
    trainer.remove_callback(PrinterCallback)
    if progress is not None and trainer.is_world_process_zero():
        trainer.add_callback(_ShowProgress(config.stage, progress))
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if arguments.should_save:
        _save_model(config, output_dir / "model", model, student)
        log = json.dumps(trainer.state.log_history, indent=1) + "\n"
        (output_dir / LOG_FILE).write_text(log, encoding="utf-8")
    return TrainSummary(
        output_dir,
        result.global_step,
        result.metrics["train_runtime"],
        [dict(entry) for entry in trainer.state.log_history],
    )


class _ShowProgress(TrainerCallback):
    """Hands the Trainer's steps to the command line's progress."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what, self._progress = what, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show one more step."""
        self._progress(f"train {self._what}", state.global_step, state.max_steps)


def _prepare_output(
    config: TrainConfig, output_dir: Path, *, resume: bool, overwrite: bool
) -> Path | None:
    """Return the checkpoint to go on from, or None to begin; never loses a run unasked.

    Raises:
        ConfigError: there is a run here already, or another one than the config describes.
    """
    if not (output_dir / CONFIG_FILE).exists():
        return None
    if int(os.environ.get("RANK", "0")) > 0:  # the first process decides, and may delete
        return last_checkpoint(output_dir) if resume else None
    if overwrite:
        return None
    if not resume:
        raise ConfigError(
            f"{output_dir} holds a run already; give --resume to go on with it, --overwrite to "
            "delete it, or another --output."
        )
    old = read_yaml(output_dir / CONFIG_FILE)
    new = yaml.safe_load(config.to_yaml())
    changed = sorted(_differences(old, new))
    if changed:
        raise ConfigError(
            f"{output_dir} was begun with another config: {', '.join(changed)} differ. Give the "
            f"old values (in {output_dir / CONFIG_FILE}), or another --output."
        )
    return last_checkpoint(output_dir)


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, or None."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the state is written last
        if number and (path / CHECKPOINT_FILE).exists():
            found.append((int(number[1]), path))
    return max(found)[1] if found else None


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted keys in which two configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [path.lstrip(".")]


def _open_targets(
    config: TrainConfig, cache_url: str | Path | None, allow_random_teachers: bool
) -> FeatureCache | None:
    """Return the cache that a run distils from, checked against the config."""
    if config.distill is None:
        return None
    if cache_url is None:
        raise ConfigError(
            "the config distils, but no cache was given; add --cache DIR, or set distill: null."
        )
    cache = open_cache(cache_url)
    if cache.geometry != config.data.geometry:
        raise ConfigError(
            f"{cache.url} holds features of geometry '{cache.geometry}'; the config asks for "
            f"data.geometry '{config.data.geometry}'. Set data.geometry: {cache.geometry}, or "
            f"build a cache with --geometry {config.data.geometry}."
        )
    for name in config.distill.teachers:
        teacher = cache[name]
        if not teacher.is_complete:
            raise CacheError(
                f"teacher '{name}' in {cache.url} lacks {len(teacher.missing_shards)} Zarr shards; "
                f"finish it with `movekd cache build --teacher {name}` before training."
            )
        if teacher.spec.weights == "random" and not allow_random_teachers:
            raise CacheError(
                f"teacher '{name}' in {cache.url} was built from random weights, which teach "
                "nothing; build it from real ones, or give --allow-random-teachers for a test."
            )
    return cache


def _training_arguments(config: TrainConfig, output_dir: Path) -> TrainingArguments:
    keys = _DEFAULTS | config.training
    has_accelerator = torch.accelerator.is_available()
    unknown = [key for key in keys if key not in TrainingArguments.__dataclass_fields__]
    if unknown:
        near = did_you_mean(unknown[0], TrainingArguments.__dataclass_fields__)
        raise ConfigError(
            f"training.{unknown[0]} is no argument of transformers.TrainingArguments.{near}"
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
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training: {error}") from None


def build_model(config: TrainConfig, cache: FeatureCache | None) -> tuple[DistillModel, Student]:
    """Return the model with what an earlier stage learned, and only what is to learn unfrozen."""
    student = build_vlm(config.student)
    shapes = {}
    if config.distill is not None and cache is not None:
        shapes = check_targets(cache, config.distill, student)
    mole = config.student.mole
    balance = mole.balance if mole is not None and mole.balance is not None else "batch"
    model = DistillModel(student, config.distill, shapes, balance)
    if config.init_from is not None:
        directory = config.init_from / "model"
        load_parts(directory, student.vlm)
        load_adapters(directory, model.adapters)
    trained = config.trained or []
    for name, parameter in student.vlm.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    return model, student


def _save_model(
    config: TrainConfig, directory: Path, model: DistillModel, student: Student
) -> None:
    """Write every part that learned, in this stage or in one before it."""
    parts: set[str] = set(config.trained or [])
    if config.init_from is not None:
        earlier = config.init_from / "model"
        parts |= {part for part, file in PART_FILES.items() if (earlier / file).exists()}
    save_parts(directory, student.vlm, sorted(parts))
    save_adapters(directory, model.adapters)
    save_tokenizer(directory, student.tokenizer)
    (directory / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
