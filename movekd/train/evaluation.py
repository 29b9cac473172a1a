"""Measure the loss of held-out samples during a run: `training.eval_steps`.

Input: the model as it is in a step, and the held-out samples. Output: means over all of them, each
counted once, under training's names with the prefix `eval_`. Dropout is off, and no random number
of training is drawn: the weights are those of a run without evaluation.

    eval_loss              the loss without the balance loss, which depends on the batch
    eval_loss_text         mean over answer tokens
    eval_loss_kd, ..._<teacher>    mean over images with targets, as in training
    eval_loss_<name>       an extra term, before its weight

A mean over nothing, such as the KD loss where no held-out sample has an image, is not logged. With
``teacher_weighting: balanced`` the KD loss depends on the batches, as in training.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from movekd.corpus.worker_process import end_with_parent
from movekd.distill.loss_terms import LossTerm, Unit
from movekd.distill.objective import count_units
from movekd.distributed import sum_over_ranks
from movekd.student import recorded_routing
from movekd.train.data import Collator, ConversationDataset
from movekd.train.encoder_data import EncoderCollator, EncoderDataset
from movekd.train.sampler import EMPTY

_UNUSED = "balance"
"""Its share of each expert is taken over a batch, so it has no mean over samples."""


def held_out_loader(
    dataset: ConversationDataset | EncoderDataset,
    collator: Collator | EncoderCollator,
    arguments: TrainingArguments,
) -> DataLoader[Any]:
    """Return this rank's batches of the held-out samples, in order.

    Every rank gets as many batches, the last ones filled with empty samples, because a forward pass
    may wait for the other ranks.
    """
    size, world_size = arguments.eval_batch_size, arguments.world_size
    positions = np.arange(len(dataset))
    missing = np.full(-len(dataset) % (size * world_size), EMPTY)
    batches = np.concatenate([positions, missing]).reshape(-1, world_size, size)
    mine = batches[:, arguments.process_index].tolist()
    num_workers = min(arguments.dataloader_num_workers, len(mine))
    return DataLoader(
        dataset,
        batch_sampler=mine,
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=end_with_parent if num_workers else None,
        pin_memory=arguments.dataloader_pin_memory,
        prefetch_factor=arguments.dataloader_prefetch_factor if num_workers else None,
    )


def held_out_losses(
    model: nn.Module,
    loader: DataLoader[Any],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: TrainingArguments,
) -> dict[str, float]:
    """Return the mean losses of the held-out samples; every rank must call this.

    Args:
        model: returns the terms of a batch (``DistillModel``).
        loader: the batches of this rank.
        prepare: moves a batch to the model's device.
        arguments: of the run.
    """
    began, num_samples = time.time(), len(loader.dataset)  # type: ignore[arg-type]
    sums: dict[str, float] = {}
    terms: dict[str, LossTerm] = {}
    counts = torch.zeros(len(get_args(Unit)), dtype=torch.int64)
    # the objective reads the routing also where only its other terms are asked for
    with measuring(model, arguments.device), recorded_routing(model):
        for batch in loader:
            del batch["keys"]
            counts += count_units(batch)
            for term in model(**prepare(batch)):
                if isinstance(term, LossTerm) and term.name != _UNUSED:
                    terms[term.name] = term
                    sums[term.name] = sums.get(term.name, 0.0) + term.sum.item()
    both = torch.tensor([*counts.tolist(), *sums.values()], dtype=torch.float64)
    total = sum_over_ranks(both.to(arguments.device) if arguments.world_size > 1 else both).tolist()
    number_of = dict(zip(get_args(Unit), total, strict=False))
    losses, whole = {}, 0.0
    for term, found in zip(terms.values(), total[len(counts) :], strict=True):
        if number := number_of[term.unit]:
            losses[f"eval_loss_{term.name}"] = found / number
            whole += (term.weight or 0.0) * found / number
    seconds = time.time() - began
    return {
        "eval_loss": whole,
        **losses,
        "eval_runtime": round(seconds, 4),
        "eval_samples_per_second": round(num_samples / max(seconds, 1e-6), 3),
    }


@contextmanager
def measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run with the model in evaluation mode, and leave mode and random numbers as they were."""
    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


class EvaluateInLastStep(TrainerCallback):
    """Evaluates in the last step of an epoch, with `eval_strategy: epoch`, instead of after it.

    A checkpoint of that step then holds the figures, and a resume neither loses nor repeats them.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for an evaluation in the last step of an epoch or of the run."""
        if args.eval_strategy != IntervalStrategy.EPOCH or args.eval_delay > (state.epoch or 0):
            return
        if float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what transformers asks for here."""
        if args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_evaluate = False
