"""DistillTrainer: transformers' Trainer with the project's reductions, order and checkpoints.

- Text loss by answer tokens and KD loss by images with targets, each over the whole optimizer
  step: all processes, all accumulation steps. Stage distill has the KD loss alone.
- One global order of samples, fixed by seed and epoch, exact after a resume.
- Checkpoints hold what learns and nothing else.
- Each term of the loss is logged by itself.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer

from movekd.errors import TrainingError
from movekd.student.checkpoint import load_exact
from movekd.train.config import TrainConfig
from movekd.train.data import Collator, ConversationDataset
from movekd.train.encoder_data import ViewCollator, ViewDataset
from movekd.train.model import DistillModel, count_answer_tokens
from movekd.train.sampler import GlobalOrderSampler

CHECKPOINT_FILE = "trained.safetensors"
_BY_IMAGE = ("token_std", "token_weight_entropy", "teacher_weight_")
"""Statistics of images: a batch without any has none, whatever it says."""


class DistillTrainer(Trainer):
    """Trains a DistillModel on conversations and cached targets.

    Args:
        config: the resolved run.
        model: the model; parameters that do not learn have ``requires_grad`` off.
        dataset: the conversations, or in stage distill the images.
        collator: reads images and targets.
        kwargs: further arguments of transformers.Trainer, ``args`` among them.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: DistillModel,
        dataset: ConversationDataset | ViewDataset,
        collator: Collator | ViewCollator,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=dataset, data_collator=collator, **kwargs)
        self.config = config
        self._distill_model = model  # beneath whatever wraps it
        self.loss_is_scaled_for_ga = True  # compute_loss divides by what the whole step holds
        self._step_counts: Tensor | None = None
        self._logged: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self._num_steps = 0  # since the last log, or since the resume
        self._last_log: float | None = None
        self._sampler: GlobalOrderSampler | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalOrderSampler:
        args = self.args
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        dataset = self.train_dataset
        lengths = dataset.modality_lengths() if self.config.data.group_by_modality_length else None
        self._sampler = GlobalOrderSampler(
            len(dataset),
            args.data_seed if args.data_seed is not None else args.seed,
            global_batch_size=batch,
            lengths=lengths,
            micro_batch_size=args.train_batch_size,
            multiple_of=args.train_batch_size * args.world_size,
        )
        return self._sampler

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> Any:
        # A dataloader that skips to a resumed step does not hand set_epoch down to the sampler.
        assert self._sampler is not None
        self._sampler.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return (answer tokens, images with targets, views seen) of the whole step."""
        self._num_steps += 1
        counts = torch.zeros(3, device=device)
        for batch in batch_samples:
            targets = batch["targets"]  # of as many rows for every teacher
            images = len(next(iter(targets.values()))) if targets else 0
            tokens = int(count_answer_tokens(batch["labels"])) if "labels" in batch else 0
            pixels = batch["pixel_values"]
            views = 0 if pixels is None else len(pixels)
            counts += torch.tensor([tokens, images, views], device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return this micro-batch's part of the step's loss.

        DDP averages gradients over processes, so the sums are multiplied by their number.
        """
        assert num_items_in_batch is not None
        keys = inputs.pop("keys")
        num_tokens, num_images, num_views = num_items_in_batch.clamp(min=1)
        is_logged = (self.state.global_step + 1) % max(self.state.logging_steps, 1) == 0
        self._distill_model.measures_rank = is_logged  # too dear for every step
        terms: dict[str, Tensor] = model(**inputs)
        world = self.args.world_size
        counts = {"text_sum": num_tokens, "balance_sum": num_views}  # the others count images
        parts = {
            name.removesuffix("_sum"): term * world / counts.get(name, num_images)
            for name, term in terms.items()
            if name.endswith("_sum")
        }
        loss = sum(
            (weight * parts[name] for name, weight in self._weights().items() if name in parts),
            torch.zeros((), device=num_images.device),
        )
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step}, in the batch of "
                f"{', '.join(keys)}. Parts: "
                f"{', '.join(f'{name} {value.item():.4g}' for name, value in parts.items())}. "
                "Lower training.learning_rate, or look at those samples; --resume goes on from "
                "the last checkpoint."
            )
        logged = {f"loss_{name}": value for name, value in parts.items()}
        for name, term in terms.items():
            if name.startswith("routing_"):
                logged[name] = term / num_views * world
            elif name.startswith(_BY_IMAGE):
                logged[name] = term * terms["num_images"].to(term.device)
        if "token_rank" in terms:
            held = (terms["num_images"] > 0).float().to(terms["token_rank"].device)
            logged |= {"token_rank": terms["token_rank"] * held, "num_ranks": held}
        self._note(logged | {"num_images": terms["num_images"]})
        return (loss, terms) if return_outputs else loss

    def _weights(self) -> dict[str, float]:
        """Return the weight of each part of the loss; the other parts are logged alone."""
        config, weights = self.config, {"text": 1.0}
        if config.distill is not None:
            assert config.distill.kd_weight is not None
            weights["kd"] = config.distill.kd_weight
        if config.student.mole is not None:
            weights["balance"] = config.student.mole.balance_weight
        return weights

    def _note(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._logged[name] = self._logged[name] + value.detach().float().cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of each term over the steps since the last log, beside Trainer's own.

        Statistics of images are means over the images since then; without any there are none.
        """
        if "loss" in logs and self._logged:
            logged = _scalars(self._logged)
            names = sorted(logged)
            sums = torch.stack([logged[name] for name in names]).to(self.args.device)
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, "mean")
            values = dict(zip(names, sums.tolist(), strict=True))
            num_images, num_ranks = values.pop("num_images"), values.pop("num_ranks", 0.0)
            if "token_rank" in values:
                rank = values.pop("token_rank")
                logs |= {"token_rank": rank / num_ranks} if num_ranks else {}
            for name, value in values.items():
                if not name.startswith(_BY_IMAGE):
                    logs[name] = value / self._num_steps
                elif num_images:
                    logs[name] = value / num_images
            logs |= self._figures_of_the_machine(start_time)
            self._logged.clear()
            self._num_steps = 0
        super().log(logs, start_time)

    def _figures_of_the_machine(self, start_time: float | None) -> dict[str, float]:
        """Return samples a second of all processes since the last log, and this one's peak memory.

        The memory is the device's where there is one, else the process's own.
        """
        args, now = self.args, time.time()
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        began = self._last_log or start_time
        self._last_log = now
        if args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(args.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        figures = {"memory_peak_gib": peak / 2**30}
        if began is not None:
            figures["samples_per_second"] = self._num_steps * batch / max(now - began, 1e-6)
        return figures

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # under FSDP every process comes here
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        parameters = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        whole = state_dict or parameters  # gathered, where the model is in pieces
        tensors = {
            name: whole[name].detach().cpu().contiguous()
            for name, parameter in parameters.items()
            if parameter.requires_grad
        }
        save_file(tensors, directory / CHECKPOINT_FILE, metadata={"format": "pt"})

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state is written next, and says that the checkpoint is whole: no process may lag.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # from the files that accelerate wrote beside ours
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        module = self.model if model is None else model
        learning = {n: p for n, p in module.named_parameters() if p.requires_grad}
        load_exact(Path(resume_from_checkpoint) / CHECKPOINT_FILE, learning)


def _scalars(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each value under its name, and those of a matrix under ``name_row_column``."""
    return {
        "_".join([name, *map(str, place)]): value[place]
        for name, value in values.items()
        for place in product(*map(range, value.shape))
    }
