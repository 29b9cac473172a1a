"""Train one run, from a resolved config to a model that `evaluate` and `ask` load.

Input: config, corpus and cache. Output: a run directory (see ``run_dir``). No teacher is loaded
and no teacher code imported: the targets are read from the cache.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from movekd.cache.reader import FeatureCache
from movekd.cache.verify import teacher_status
from movekd.corpus.index import Corpus
from movekd.corpus.record import require_as_packed
from movekd.distill.loss_terms import read_loss_terms
from movekd.distill.objective import Objective
from movekd.distributed import (
    broadcast_decision,
    gather,
    is_dead_peer_error,
    is_main_process,
    launch_id,
)
from movekd.errors import ConfigError, MovekdError, TrainingError
from movekd.student.checkpoint import CONFIG_FILE, save_adapters, save_parts
from movekd.student.tokenizer import forget_calls
from movekd.student.vlm import Student, build_encoder, build_vlm
from movekd.train.checkpoints import PARTIAL_DIR, remove_partial, writing
from movekd.train.config import TrainConfig
from movekd.train.data import Collator, ConversationDataset
from movekd.train.datasets import RunData, read_data
from movekd.train.encoder_data import EncoderCollator, EncoderDataset
from movekd.train.evaluation import EvaluateInLastStep
from movekd.train.fingerprints import (
    PACKED_ROWS,
    input_fingerprints,
    require_same_inputs,
    require_unchanged_inputs,
)
from movekd.train.fsdp import (
    gather_parameters,
    refuse_fsdp_on_cpu,
    refuse_zero3,
    require_fsdp2,
)
from movekd.train.init_from import check_init_from, load_init_from
from movekd.train.knn_probe import KnnProbe, read_probe_images
from movekd.train.language_model_keys import refuse_sharding_in_4bit
from movekd.train.mixture import Mixture, Part, join, parts_of
from movekd.train.model import DistillModel, check_targets
from movekd.train.packed_data import PackedDataset, packed_rows
from movekd.train.packing_keys import require_packable
from movekd.train.run_dir import plan_start, prepare_run, write_run_files
from movekd.train.run_record import (
    LOG_FILE,
    MODEL_DIR,
    curve_files,
    lock_run,
    publish_model,
    record_curves,
    write_recorded,
)
from movekd.train.sample_count import SampleCount, count_all
from movekd.train.sources import Source, open_sources
from movekd.train.trained_parts import parts_to_save, set_trained
from movekd.train.trainer import DistillTrainer
from movekd.train.training_args import divide_step, global_batch_size, training_arguments

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainSummary:
    """The result of a run.

    Attributes:
        output_dir: the run directory.
        steps: all optimizer steps, also those before a resume.
        seconds: training time since the run started or was resumed.
        log: every logged step, in order.
    """

    output_dir: Path
    steps: int
    seconds: float
    log: list[dict[str, float]]


@contextmanager
def _short_errors() -> Iterator[None]:
    """Raise errors of DataLoader workers and dead ranks again, without their tracebacks."""
    try:
        yield
    except MovekdError as error:
        *before, last = str(error).strip().splitlines()
        if not any("DataLoader worker" in line for line in before):
            raise
        raise type(error)(re.sub(r"^[\w.]+: ", "", last)) from None
    except RuntimeError as error:
        if not is_dead_peer_error(error):
            raise
        raise TrainingError(
            f"another process of this run has ended ({str(error).splitlines()[0]}); expected all "
            "to stay until the end. If it printed no error, it was killed, perhaps for lack of "
            "memory. Give --resume to continue from the last checkpoint; torchrun --max-restarts "
            "does so by itself."
        ) from None


P = ParamSpec("P")
Train = Callable[Concatenate[TrainConfig, Path, P], TrainSummary]


def _exclusive(train: Train[P]) -> Train[P]:
    """Return ``train`` with its run directory locked, from before anything in it is read."""

    @wraps(train)
    def locked(config: TrainConfig, output_dir: Path, /, *args: P.args, **kw: P.kwargs) -> Any:
        training_arguments(config, output_dir)  # this connects the ranks
        with ExitStack() as held:
            broadcast_decision(lambda: held.enter_context(lock_run(output_dir)))
            return train(config, output_dir, *args, **kw)

    return locked


@_short_errors()
@_exclusive
def train(
    config: TrainConfig,
    output_dir: Path,
    cache_url: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    allow_random_teachers: bool = False,
    verify_cache: bool = False,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> TrainSummary:
    """Train to the end, and save the model.

    A run that was interrupted and resumed ends with the weights of an uninterrupted one, bit for
    bit on CPU. It takes the newest whole checkpoint. A restart by torchrun resumes the run without
    ``resume``, with the same samples in each step, also in another number of processes.

    Args:
        config: the resolved run.
        output_dir: the run directory.
        cache_url: the feature cache, a folder or URL; needed if the config distils.
        resume: continue from the last whole checkpoint in ``output_dir``, or start there.
        overwrite: delete the files of an earlier run in ``output_dir``.
        force: with ``overwrite``, delete also files at a run's names that are not as a run
            recorded them.
        allow_random_teachers: accept targets of teachers with random weights (tests, benchmarks).
        verify_cache: compare each Zarr shard with its checksum before its first row is used.
        progress: called with the name of the stage, the steps done and all steps.
        notify: called in rank 0 with what a user should know, a line each.

    Raises:
        MovekdError: config, corpus and cache do not match; names the key that differs. Or another
            training works in ``output_dir``.
        TrainingError: the loss or a weight is NaN or infinite, no checkpoint is whole, the disk is
            full, or another process has ended.
    """
    arguments = training_arguments(config, output_dir)
    refuse_fsdp_on_cpu(arguments)
    refuse_zero3(arguments.deepspeed_plugin)
    refuse_sharding_in_4bit(config, arguments)
    if config.data.packing:
        broadcast_decision(lambda: require_packable(config))
    launches = gather(launch_id())
    start = broadcast_decision(
        lambda: plan_start(
            config, output_dir, launches, resume=resume, overwrite=overwrite, force=force
        )
    )
    if start.samples not in (None, global_batch_size(arguments)):
        arguments = training_arguments(divide_step(config, arguments, start.samples), output_dir)
    sources = open_sources(
        config,
        cache_url,
        allow_random_teachers=allow_random_teachers,
        verify_cache=verify_cache,
    )
    for corpus in dict.fromkeys(source.corpus for source in sources):
        broadcast_decision(partial(require_as_packed, corpus.data_dir))
    inputs = input_fingerprints(config, sources, global_batch_size(arguments))
    probe_images = read_probe_images(config.data, arguments, progress)
    if probe_images is not None:
        inputs["probe images"] = probe_images.fingerprint()
        if notify is not None and is_main_process():
            notify(probe_images.describe())
    require_same_inputs(gather(inputs))
    if start.checkpoint is not None:
        broadcast_decision(lambda: require_unchanged_inputs(output_dir, inputs))
    set_seed(arguments.seed)
    model, student = build_model(config, sources[0].cache)
    data = read_data(config, sources, student)
    counts: list[SampleCount | None] = [None] * len(data.trained)
    if start.checkpoint is None:
        counts = _count_all_samples(config, data, arguments, progress, notify)
    else:
        arguments.eval_on_start = False  # it was measured when the run began
    parts = [
        Part(part.source, packed_rows(config, part.dataset, arguments, progress, notify, count))
        for part, count in zip(data.trained, counts, strict=True)
    ]
    trained = join(parts)
    if isinstance(trained, Mixture) and notify is not None and is_main_process():
        for line in trained.describe():
            notify(line)
    packed = [p.dataset.fingerprint() for p in parts if isinstance(p.dataset, PackedDataset)]
    if packed:
        inputs[PACKED_ROWS] = packed[0] if len(packed) == 1 else packed
        if start.checkpoint is not None:
            broadcast_decision(lambda: require_unchanged_inputs(output_dir, inputs))
    try:
        trainer = DistillTrainer(
            config,
            model,
            trained,
            data.collator,
            KnnProbe.of(probe_images, student, config.data),
            args=arguments,
            eval_dataset=data.held_out,
            callbacks=[EvaluateInLastStep()],
        )
        trainer.create_optimizer()  # before anything is written: it may refuse its arguments
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"training: {error}") from None
    require_fsdp2(arguments, trainer.accelerator)
    if arguments.should_save:
        lines = prepare_run(output_dir, start, force=force)  # only now: all checks have passed
        if notify is not None and is_main_process():
            for line in lines:
                notify(line)
        names = config.distill.teachers if config.distill is not None else ()
        caches = dict.fromkeys(s.cache for s in sources if s.cache is not None)
        teachers = [teacher_status(cache[n], cache.catalog) for cache in caches for n in names]
        write_run_files(output_dir, config, inputs, launches, teachers)
    trainer.remove_callback(PrinterCallback)
    if progress is not None and trainer.is_world_process_zero():
        trainer.add_callback(_ShowProgress(config.stage, progress))
    if arguments.should_save:
        trainer.add_callback(_RecordCurves(output_dir))
    result = trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
    if arguments.load_best_model_at_end:
        trainer.load_best()
    gather_parameters(model)
    trainer.require_finite()
    if arguments.should_save:
        with writing("the model", output_dir):
            _save_model(config, output_dir, model, student)
            log = json.dumps(trainer.state.log_history, indent=1) + "\n"
            write_recorded(output_dir, {LOG_FILE: log})
        trainer.rotate_checkpoints()  # a kill may have interrupted the last one
    return TrainSummary(
        output_dir,
        result.global_step,
        result.metrics["train_runtime"],
        [dict(entry) for entry in trainer.state.log_history],
    )


def _count_all_samples(
    config: TrainConfig,
    data: RunData,
    arguments: TrainingArguments,
    progress: Progress | None,
    notify: Callable[[str], None] | None,
) -> list[SampleCount | None]:
    """Say which samples are held out or teach nothing; return the count of each source's."""
    tell = notify if notify is not None and arguments.process_index == 0 else None
    if tell is not None and (said := data.describe()) is not None:
        tell(said)
    trained = [part.dataset for part in data.trained]
    counts: list[SampleCount | None] = []
    for datasets, what in ((trained, ""), (parts_of(data.held_out), "held-out ")):
        for dataset in datasets:
            if not isinstance(dataset, ConversationDataset):
                counts.append(None)
                continue
            rank, num_ranks = arguments.process_index, arguments.world_size
            packs = config.data.packing and datasets is trained
            count = count_all(dataset, rank, num_ranks, progress, needs_lengths=packs)
            of = f" of {dataset.corpus.data_dir}" if len(datasets) > 1 else ""
            count.what = f"{what}conversations{of}"
            count.require_samples(dataset.max_length)
            if tell is not None and count.has_losses:
                tell(count.sentence(dataset.max_length))
            counts.append(count)
    return counts[: len(trained)]


class _ShowProgress(TrainerCallback):
    """Reports the Trainer's steps to the command line's progress bar."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what, self._progress = what, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report one more step."""
        self._progress(f"train {self._what}", state.global_step, state.max_steps)


class _RecordCurves(TrainerCallback):
    """Records the files of TensorBoard as this run's; its callback has opened them before."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir, self._before = output_dir, curve_files(output_dir)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the new files."""
        record_curves(self._output_dir, self._before)


def build_data(
    config: TrainConfig, corpus: Corpus, cache: FeatureCache | None, student: Student
) -> tuple[ConversationDataset | EncoderDataset, Collator | EncoderCollator]:
    """Return the samples that a run of one corpus learns from, before any packing."""
    (keys,) = config.data.all_sources()
    data = read_data(config, [Source(keys, corpus, cache)], student)
    return data.trained[0].dataset, data.collator


def build_model(config: TrainConfig, cache: FeatureCache | None) -> tuple[DistillModel, Student]:
    """Return the model with the weights of ``init_from``; only `trained` parts have gradients."""
    is_encoder_only = config.stage == "distill"
    if config.init_from is not None:
        check_init_from(config)  # before any weights are read
    student = build_encoder(config.student) if is_encoder_only else build_vlm(config.student)
    shapes = {}
    if config.distill is not None and cache is not None:
        shapes = check_targets(cache, config.distill, student)
    extra = read_loss_terms(config.loss_terms, has_targets=config.distill is not None)
    objective = Objective(config.distill, extra_terms=extra)
    if (mole := config.student.mole) is not None:
        assert mole.balance is not None
        objective = replace(objective, balance=mole.balance, balance_weight=mole.balance_weight)
        if mole.experts == "per_teacher":
            objective = replace(objective, free_kd_share=mole.free_kd_share)
    model = DistillModel(student, objective, shapes)
    if config.init_from is not None:
        model.loaded_parts = load_init_from(config, student, model.adapters)
    set_trained(config, student.vlm)
    return model, student


def _save_model(
    config: TrainConfig, output_dir: Path, model: DistillModel, student: Student
) -> None:
    """Write every part that learned, in this stage or an earlier one."""
    directory = output_dir / PARTIAL_DIR / MODEL_DIR
    save_parts(directory, student.vlm, parts_to_save(config, model.loaded_parts))
    save_adapters(directory, model.adapters)
    if student.tokenizer is not None:
        forget_calls(student.tokenizer).save_pretrained(directory)
    (directory / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    publish_model(directory, output_dir)
    remove_partial(output_dir)
