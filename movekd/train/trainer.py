"""Train with transformers' Trainer: the project's loss, sample order and checkpoints.

- The loss is ``distill.objective``: each term is normalised over the whole optimizer step.
- The order of samples is global, fixed by seed and epoch, and exact after a resume.
- A checkpoint holds only the parameters that learn.
"""

import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl

from movekd.corpus.worker_process import end_with_parent
from movekd.distill.loss_terms import Unit
from movekd.distill.objective import LossLog, count_units, padding_statistic, step_loss
from movekd.distributed import sum_over_ranks
from movekd.errors import TrainingError, shorten
from movekd.student.checkpoint import load_exact, part_of
from movekd.train.checkpoints import (
    CHECKPOINT_FILE,
    PARTIAL_DIR,
    continue_hint,
    publish,
    require_checkpoint,
    rotate,
    writing,
)
from movekd.train.config import TrainConfig
from movekd.train.data import Collator
from movekd.train.encoder_data import EncoderCollator
from movekd.train.evaluation import held_out_loader, held_out_losses
from movekd.train.fsdp import complete_optimizer_state
from movekd.train.knn_probe import KnnProbe
from movekd.train.mixture import Mixture, Trained, row_lengths
from movekd.train.model import DistillModel
from movekd.train.parameter_groups import RateLog, divide_groups
from movekd.train.sampler import GlobalOrderSampler
from movekd.train.step_losses import STATE_KEY, StepLosses
from movekd.train.training_args import global_batch_size


class DistillTrainer(Trainer):
    """Trains a DistillModel on conversations and cached targets.

    Args:
        config: the resolved run.
        model: the model; parameters that do not learn have ``requires_grad`` off.
        dataset: the conversations, or rows of them, or in stage distill the images; or a mixture.
        collator: reads images and targets.
        probe: measures the encoder in every evaluation.
        kwargs: further arguments of transformers.Trainer, ``args`` included.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: DistillModel,
        dataset: Trained | Mixture,
        collator: Collator | EncoderCollator,
        probe: KnnProbe | None = None,
        **kwargs: Any,
    ) -> None:
        if probe is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []  # Trainer asks for one wherever it evaluates
        super().__init__(model=model, train_dataset=dataset, data_collator=collator, **kwargs)
        self.config = config
        self._distill_model = model  # without what wraps it
        self.loss_is_scaled_for_ga = True  # step_loss divides by the counts of the whole step
        self._log = LossLog()  # since the last log, or since the resume
        self._steps: StepLosses | None = None
        self._last_log: float | None = None
        self._sampler: GlobalOrderSampler | None = None
        self._is_saving = False
        self.control: TrainerControl
        self._held_out: DataLoader[Any] | None = None
        self._evaluation_s = 0.0  # since the last log
        self._probe = probe
        self._rate_log = RateLog()
        self.add_callback(self._rate_log)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make Trainer's optimizer, and give parts the learning rates of `learning_rates`.

        Raises:
            ConfigError: the optimizer does not take rates of parts.
        """
        rates, is_new = self.config.learning_rates, self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and rates is not None:
            named = (self.model if model is None else model).named_parameters()
            divide_groups(optimizer, named, rates.given())
        return optimizer

    def get_train_dataloader(self) -> Any:
        """Return Trainer's loader, whose processes end with this one, however it ends."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # what accelerate's starts, or copies
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalOrderSampler:
        args = self.args
        dataset = self.train_dataset
        lengths = dataset.modality_lengths() if self.config.data.group_by_modality_length else None
        self._sampler = GlobalOrderSampler(
            len(dataset),
            args.data_seed if args.data_seed is not None else args.seed,
            global_batch_size=global_batch_size(args),
            lengths=lengths,
            micro_batch_size=args.train_batch_size,
            multiple_of=args.train_batch_size * args.world_size,
            row_lengths=row_lengths(dataset),
            draw=dataset.draw if isinstance(dataset, Mixture) else None,
        )
        return self._sampler

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> Any:
        # Resumed from the last step inside an epoch, Trainer would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        # A dataloader that skips to a resumed step does not pass set_epoch to the sampler.
        assert self._sampler is not None
        self._sampler.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the counts of the whole step (see ``count_units``)."""
        self._log.num_steps += 1
        if self.config.data.packing:
            self._log.add({}, [padding_statistic(batch) for batch in batch_samples])
        counts = torch.stack([count_units(batch) for batch in batch_samples]).sum(0)
        return sum_over_ranks(counts.to(device))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return this micro-batch's part of the step's loss."""
        assert num_items_in_batch is not None
        keys = inputs.pop("keys")
        is_logged = (self.state.global_step + 1) % max(self.state.logging_steps, 1) == 0
        self._distill_model.measures_rank = is_logged  # too slow for every step
        terms = model(**inputs)
        loss, parts = step_loss(terms, num_items_in_batch, self.args.world_size)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step}, in the batch of "
                f"{', '.join(keys)}. Parts: "
                f"{', '.join(f'{name} {value.item():.4g}' for name, value in parts.items())}. "
                "Lower training.learning_rate, or look at those samples. "
                f"{continue_hint(Path(self.args.output_dir))}"
            )
        self._log.add(parts, terms)
        num_images = int(num_items_in_batch[get_args(Unit).index("images")])
        self._step_losses().add(self.state.global_step + 1, self.state.max_steps, parts, num_images)
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means since the last log (``LossLog``), beside Trainer's own."""
        if "loss" in logs and self._log.num_steps:
            logs |= self._speed_and_memory(start_time) | self._log.take(self.args.device)
            self._rate_log.add_to(logs)
        if "train_runtime" in logs:  # the end of the run
            self._step_losses().gather(self.args.world_size)
            logs |= self._step_losses().figures(self.state.max_steps)
        super().log(logs, start_time)

    def _step_losses(self) -> StepLosses:
        """Return the losses of single steps, with those from before a resume."""
        if self._steps is None:
            distill, state = self.config.distill, self.state
            names = distill.teachers if distill is not None else ()
            stored = state.stateful_callbacks.get(STATE_KEY)
            self._steps = StepLosses(names, stored, state.global_step)
        return self._steps

    def _speed_and_memory(self, start_time: float | None) -> dict[str, float]:
        """Return samples per second of all ranks since the last log, and this rank's peak memory.

        The memory is the GPU's if the run has one, otherwise the process's.
        """
        args, now = self.args, time.time()
        began = self._last_log or start_time
        self._last_log = now
        if args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(args.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        figures = {"memory_peak_gib": peak / 2**30}
        if began is not None:
            num_samples = self._log.num_steps * global_batch_size(args)
            num_samples *= getattr(self.train_dataset, "samples_per_row", 1)
            seconds = now - began - self._evaluation_s
            figures["samples_per_second"] = num_samples / max(seconds, 1e-6)
        self._evaluation_s = 0.0
        return figures

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # FSDP calls this in every rank
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        parameters = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        whole = state_dict or parameters  # gathered, if FSDP shards the model
        tensors = {
            name: whole[name].detach().cpu().contiguous()
            for name, parameter in parameters.items()
            if parameter.requires_grad
        }
        save_file(tensors, directory / CHECKPOINT_FILE, metadata={"format": "pt"})

    def _get_output_dir(self, trial: Any) -> str:
        output_dir: str = super()._get_output_dir(trial)
        return str(Path(output_dir) / PARTIAL_DIR) if self._is_saving else output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint whole or not at all, then delete older ones (`save_total_limit`)."""
        self.require_finite()
        if self.is_fsdp_enabled:
            optimizer: Any = self.optimizer
            complete_optimizer_state(getattr(optimizer, "optimizer", optimizer))
        self._step_losses().gather(self.args.world_size)
        self.state.stateful_callbacks[STATE_KEY] = self._step_losses().state()
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with writing(name, output_dir):
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_saving = False
                self.state.best_model_checkpoint = None  # ``load_best`` finds it by its step
            self.accelerator.wait_for_everyone()  # each rank writes its own part
            if self.args.should_save:
                publish(output_dir / PARTIAL_DIR / name, output_dir)
                self.rotate_checkpoints()

    def rotate_checkpoints(self) -> None:
        """Delete all but the newest `save_total_limit` checkpoints, and keep the best one."""
        args = self.args
        best = self.state.best_global_step if args.load_best_model_at_end else None
        rotate(Path(args.output_dir), args.save_total_limit, kept_step=best)

    def load_best(self) -> None:
        """Load the weights of the step with the smallest held-out loss.

        Raises:
            TrainingError: no evaluation had a finite loss, or the step's checkpoint is damaged.
        """
        step = self.state.best_global_step
        if not step:
            raise TrainingError(
                "training.load_best_model_at_end finds no step with a finite held-out loss. Lower "
                "training.learning_rate, or look at the held-out samples."
            )
        self._load_from_checkpoint(str(require_checkpoint(Path(self.args.output_dir), step)))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Log and return the figures of held-out samples and of the probe (see ``evaluation``)."""
        figures: dict[str, float] = {}
        if self.eval_dataset:
            if self._held_out is None:
                self._held_out = held_out_loader(self.eval_dataset, self.data_collator, self.args)
            self._distill_model.measures_rank = False
            figures = held_out_losses(self.model, self._held_out, self._prepare_inputs, self.args)
        if self._probe is not None:
            figures |= self._probe.measure(self.args)
        self._evaluation_s += sum(figures.get(f"eval_{k}runtime", 0.0) for k in ("", "knn_"))
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, figures
        )
        return figures

    def require_finite(self) -> None:
        """Refuse to save weights that are NaN or infinite; every rank must call this.

        Raises:
            TrainingError: names the parts and the step.
        """
        bad = []
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.requires_grad and not torch.isfinite(values).all():
                bad.append(name)
        num_bad = torch.tensor(len(bad), device=self.args.device)
        if int(sum_over_ranks(num_bad)):  # FSDP: perhaps in the shards of another rank
            parts = sorted({"adapters" if "adapters." in n else part_of(n) for n in bad})
            raise TrainingError(
                f"weights of {', '.join(parts) or 'another process'} are not finite after step "
                f"{self.state.global_step}{f' ({bad[0]})' if bad else ''}, so they were not saved. "
                "Lower training.learning_rate, or look at the samples of that step. "
                f"{continue_hint(Path(self.args.output_dir))}"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # from the files that accelerate wrote
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        module = self.model if model is None else model
        learning = {n: p for n, p in module.named_parameters() if p.requires_grad}
        load_exact(Path(resume_from_checkpoint) / CHECKPOINT_FILE, learning)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)


def _start_worker(seed: Callable[[int], None] | None, worker: int) -> None:
    """Start a process of the loader: first what ends it, then Trainer's seed."""
    end_with_parent(worker)
    if seed is not None:
        seed(worker)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Turn the errors of a checkpoint without checksums that holds something else into one."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, pickle.PickleError) as error:
        if checkpoint is None:
            raise
        raise TrainingError(
            f"{checkpoint} cannot be resumed from: {shorten(error)}; expected the state that "
            "`movekd train` saved with this config. Remove that folder to resume from an earlier "
            "checkpoint."
        ) from None
