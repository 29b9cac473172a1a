"""Train a run's model step by step, whole in one process or sharded by ``fully_shard`` in several.

Trainer shards only on accelerators, so this loop stands in for it on a CPU. Everything else is that
of a run: model, packed rows, order of samples, losses, parameter groups, gathering.

As a program (see ``main``), in every rank: `python -m sharded_steps CONFIG CACHE FOLDER 1 3`.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import set_seed

from movekd.cache import open_cache
from movekd.corpus.index import open_corpus
from movekd.distill.objective import count_units, step_loss
from movekd.distributed import sum_over_ranks
from movekd.student.checkpoint import load_exact, save_adapters, save_parts
from movekd.train.checkpoints import CHECKPOINT_FILE
from movekd.train.config import TrainConfig, load_config
from movekd.train.fsdp import complete_optimizer_state, gather_parameters
from movekd.train.packed_data import pack
from movekd.train.run import build_data, build_model
from movekd.train.sample_count import count_all
from movekd.train.trained_parts import parts_to_save
from movekd.train.trainer import DistillTrainer
from movekd.train.training_args import global_batch_size, training_arguments

OPTIMIZER_FILE = "optimizer.pt"
WEIGHTS_FILE = "weights.pt"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""How accelerate gathers the optimizer of FSDP2 for `fsdp_state_dict_type: FULL_STATE_DICT`."""


class Steps:
    """A run whose optimizer steps are taken by hand.

    Args:
        config: the run, without dropout and schedule.
        cache: the folder of the feature cache.
        folder: what is written goes there.
        is_sharded: shard the language model's and the tower's blocks, and the rest as one piece.
    """

    def __init__(self, config: TrainConfig, cache: Path, folder: Path, is_sharded: bool) -> None:
        arguments = training_arguments(config, folder)  # this connects the ranks
        features = open_cache(cache)
        set_seed(0)
        self.config = config
        self.model, student = build_model(config, features)
        dataset, collator = build_data(config, open_corpus(config.data.shards), features, student)
        rank, num_ranks = arguments.process_index, arguments.world_size
        count = count_all(dataset, rank, num_ranks, needs_lengths=True)
        self.rows = pack(dataset, config, count.lengths)
        self.trainer = DistillTrainer(config, self.model, self.rows, collator, args=arguments)
        self.before, self.first, self.norms = whole(self.model), {}, []
        if is_sharded:
            for layer in self.model.vlm.model.language_model.layers:
                fully_shard(layer)
            for layer in self.model.vlm.model.vision_tower.encoder.layers:
                fully_shard(layer)
            fully_shard(self.model)
            require_sharded(self.model, num_ranks)
        self.optimizer = self.trainer.create_optimizer()
        self.model.train()

    def take(self, start: int, end: int) -> None:
        """Take the steps from ``start`` to before ``end``, each rank its share of the rows."""
        arguments = self.trainer.args
        order, size = list(self.trainer._get_train_sampler()), global_batch_size(arguments)
        share = size // arguments.world_size
        for number in range(start, end):
            at = number * size + arguments.process_index * share
            batch = self.trainer.data_collator([self.rows[row] for row in order[at : at + share]])
            counts = sum_over_ranks(count_units(batch))
            batch.pop("keys")
            loss, _ = step_loss(self.model(**batch), counts, arguments.world_size)
            loss.backward()
            learning = [p for p in self.model.parameters() if p.requires_grad]
            norm = nn.utils.clip_grad_norm_(learning, arguments.max_grad_norm)
            self.norms.append(float(full(norm)))
            gradients = {
                n: full(p.grad) for n, p in self.model.named_parameters() if p.grad is not None
            }
            self.optimizer.step()
            self.optimizer.zero_grad()
            if number == 0:
                self.first = {"gradients": gradients, "after": whole(self.model)}

    def write(self, folder: Path) -> None:
        """Write a checkpoint as Trainer does, the parts of the run, and what the tests look at.

        That is every parameter before the first step, now, and after the first one, with the
        gradients and their norms.
        """
        weights = {"before": self.before, "now": whole(self.model), **self.first}
        complete_optimizer_state(self.optimizer)
        state = get_optimizer_state_dict(self.model, self.optimizer, options=FULL)
        gather_parameters(self.model)
        if self.trainer.args.should_save:
            folder.mkdir(parents=True)
            self.trainer._save(str(folder))
            torch.save(state, folder / OPTIMIZER_FILE)
            parts = parts_to_save(self.config, self.model.loaded_parts)
            save_parts(folder / "model", self.model.vlm, parts)
            save_adapters(folder / "model", self.model.adapters)
            torch.save(weights | {"norms": self.norms}, folder / WEIGHTS_FILE)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def load(self, folder: Path) -> None:
        """Load the weights that learn and the optimizer from a checkpoint, into a whole model."""
        learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        load_exact(folder / CHECKPOINT_FILE, learning)
        state: Any = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=FULL)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered if it is sharded; every rank must call this."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().clone()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter; every rank must call this."""
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def require_sharded(model: nn.Module, num_ranks: int) -> None:
    """Check that each rank holds its share of every parameter: no quiet DDP."""
    assert num_ranks == distributed.get_world_size() > 1
    num_local = num_all = 0
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        num_local, num_all = num_local + parameter.to_local().numel(), num_all + parameter.numel()
    assert num_local < 0.6 * num_all  # 0.5 where every first dimension is even


def main(config: str, cache: str, folder: str, first: str, second: str) -> None:
    """Take ``first`` steps, write FOLDER/first, take the steps up to ``second``, write again."""
    torch.set_num_threads(1)
    # ranks that wait for different things fail; TrainingArguments would give them half an hour
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    steps = Steps(load_config(Path(config)), Path(cache), Path(folder), is_sharded=True)
    steps.take(0, int(first))
    steps.write(Path(folder) / "first")
    steps.take(int(first), int(second))
    steps.write(Path(folder) / "second")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
