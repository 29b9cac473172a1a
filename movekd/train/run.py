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
from movekd.corpus.anyres import Views
from movekd.corpus.index import Corpus, open_corpus
from movekd.errors import CacheError, ConfigError, WeightsError, did_you_mean
from movekd.student.files import (
    CONFIG_FILE,
    PART_FILES,
    load_adapters,
    load_exact,
    load_parts,
    part_of,
    part_parameters,
    save_adapters,
    save_parts,
    save_tokenizer,
)
from movekd.student.vlm import Student, build_encoder, build_vlm
from movekd.train.config import ENCODER_PARTS, TrainConfig
from movekd.train.data import Collator, ConversationDataset, read_conversations
from movekd.train.images import ViewCollator, ViewDataset
from movekd.train.model import DistillModel, check_targets
from movekd.train.sharding import gather_parameters, refuse_fsdp_on_cpu, require_fsdp2
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

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names until transformers 5.22 or so; where the new ones exist, the old ones warn."""


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
    refuse_fsdp_on_cpu(arguments)
    set_seed(arguments.seed)
    model, student = build_model(config, cache)
    dataset, collator = build_data(config, corpus, cache, student)
    if arguments.should_save:
        if overwrite:  # not before all the rest was found to fit
            shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    trainer = DistillTrainer(config, model, dataset, collator, args=arguments)
    require_fsdp2(arguments, trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    if progress is not None and trainer.is_world_process_zero():
        trainer.add_callback(_ShowProgress(config.stage, progress))
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    gather_parameters(model)
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
    if config.distill.views == "all" and cache.views == "base":
        raise ConfigError(
            f"distill.views is 'all', but {cache.url} holds base views only. Build a cache with "
            "--views anyres, or set distill.views: base."
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
    fields = TrainingArguments.__dataclass_fields__
    keys = _DEFAULTS | config.training
    for old, new in _RENAMED.items():
        if old in keys and new in fields:
            keys[new] = keys.pop(old)
    has_accelerator = torch.accelerator.is_available()
    unknown = [key for key in keys if key not in fields]
    if unknown:
        near = did_you_mean(unknown[0], fields)
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


def build_data(
    config: TrainConfig, corpus: Corpus, cache: FeatureCache | None, student: Student
) -> tuple[ConversationDataset, Collator] | tuple[ViewDataset, ViewCollator]:
    """Return the samples of a run, and what makes batches of them."""
    teachers = () if config.distill is None else tuple(config.distill.teachers)
    assert config.data.geometry is not None
    transform = student.image_transform(config.data.geometry)
    target_views: Views = "base"
    if config.distill is not None and config.distill.views == "all":
        target_views = "anyres"
    if config.stage == "distill":
        assert cache is not None
        dataset = ViewDataset(corpus, cache, teachers, target_views)
        return dataset, ViewCollator(corpus, transform, cache, teachers)
    assert config.student.prompt is not None
    conversations = ConversationDataset(
        read_conversations(config.data, corpus),
        corpus,
        cache,
        teachers,
        student,
        config.student.prompt,
        config.data.model_max_length,
        target_views,
    )
    return conversations, Collator(
        corpus,
        transform,
        cache,
        teachers,
        student.tokenizer.pad_token_id,
        student.views,
        target_views,
    )


def build_model(config: TrainConfig, cache: FeatureCache | None) -> tuple[DistillModel, Student]:
    """Return the model with what an earlier stage learned, and only what is to learn unfrozen."""
    is_encoder_alone = config.stage == "distill"
    student = build_encoder(config.student) if is_encoder_alone else build_vlm(config.student)
    shapes = {}
    if config.distill is not None and cache is not None:
        shapes = check_targets(cache, config.distill, student)
    mole = config.student.mole
    balance = mole.balance if mole is not None and mole.balance is not None else "batch"
    model = DistillModel(student, config.distill, shapes, balance)
    if config.init_from is not None:
        directory = config.init_from / "model"
        if is_encoder_alone:
            _load_encoder(directory, student)
        else:
            load_parts(directory, student.vlm)
        load_adapters(directory, model.adapters)
    trained = config.trained or []
    for name, parameter in student.vlm.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    return model, student


def _load_encoder(directory: Path, student: Student) -> None:
    """Load what an earlier stage learned in the tower; its other parts are not for an encoder."""
    files = {part: directory / PART_FILES[part] for part in ENCODER_PARTS}
    found = {part: path for part, path in files.items() if path.exists()}
    if not found:
        raise WeightsError(
            f"{directory} holds neither {' nor '.join(path.name for path in files.values())}; "
            "init_from of stage: distill expects a run that trained the encoder."
        )
    for part, path in found.items():
        load_exact(path, dict(part_parameters(student.vlm, part)))


def _save_model(
    config: TrainConfig, directory: Path, model: DistillModel, student: Student
) -> None:
    """Write every part that learned, in this stage or in one before it."""
    parts: set[str] = set(config.trained or [])
    if config.init_from is not None:
        earlier = config.init_from / "model"
        parts |= {part for part, file in PART_FILES.items() if (earlier / file).exists()}
    if config.stage == "distill":
        parts &= set(ENCODER_PARTS)
    save_parts(directory, student.vlm, sorted(parts))
    save_adapters(directory, model.adapters)
    if student.tokenizer is not None:
        save_tokenizer(directory, student.tokenizer)
    (directory / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
