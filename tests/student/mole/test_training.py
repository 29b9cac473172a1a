"""A tower with experts in training: precision, checkpointing, compiling, several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from movekd.distill import balance_loss, choice_share
from movekd.student.mole import MoleConfig, routing
from small_tower import OFFICIAL, REVISED, clip, pixels, shake, tokens

# PEFT 0.21 asks transformers 5.23 for a property by its old name; nothing here can change that.
# The old name of the switch is the only one that transformers 5.17 has too.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:FutureWarning")
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable")
]


def test_a_half_precision_tower_trains_experts_in_float32() -> None:
    model = get_peft_model(clip().bfloat16(), MoleConfig(**REVISED))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    tokens_BND = tokens(model, pixels().bfloat16())
    assert tokens_BND.dtype == torch.bfloat16
    tokens_BND.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("config", [OFFICIAL, REVISED], ids=["official", "revised"])
def test_checkpointing_the_tower_changes_no_gradient(config: dict[str, Any]) -> None:
    def step(is_checkpointed: bool) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(4)
        model = get_peft_model(clip(), MoleConfig(**config))
        shake(model)
        model.train()
        if is_checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)  # dropout
        loss = tokens(model, pixels().requires_grad_()).square().mean()
        (loss + balance_loss(routing(model), "sample")).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = step(False), step(True)
    for name, gradient in plain.items():
        if gradient is None:  # the official last block sees the balance loss alone
            assert "layers.2.mlp.mole_fc" in name
            assert checkpointed[name] is None
        else:
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("config", [OFFICIAL, REVISED], ids=["official", "revised"])
def test_the_whole_tower_compiles_without_graph_breaks(config: dict[str, Any]) -> None:
    model = get_peft_model(clip(), MoleConfig(lora_dropout=0.0, **config))
    shake(model)
    tower = model.get_base_model()
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]

    def step(forward: Callable[..., Any]) -> list[torch.Tensor]:
        loss = forward(pixels()).last_hidden_state.square().mean()
        loss = loss + balance_loss(routing(tower), "batch")
        return [loss, *torch.autograd.grad(loss, trained)]

    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for one, two in zip(step(compiled), step(tower), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    tower.eval()
    with torch.no_grad():
        found = compiled(pixels()).last_hidden_state
        torch.testing.assert_close(found, tower(pixels()).last_hidden_state)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_tower_trains_under_bfloat16_autocast(is_checkpointed: bool) -> None:
    model = get_peft_model(clip(), MoleConfig(lora_dropout=0.0, **REVISED))
    shake(model)
    if is_checkpointed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens_BND = tokens(model, pixels().requires_grad_())
        loss = tokens_BND.float().square().mean() + balance_loss(routing(model), "batch")
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    assert all(record.probabilities_BNE.dtype == torch.float32 for record in routing(model))


class _Step(nn.Module):
    """A training step whose forward returns the loss, as the trainer's model does."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        task = tokens(self.tower, pixels).square().mean()
        share = choice_share(routing(self.tower))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(share)
            share /= torch.distributed.get_world_size()
        return task + balance_loss(routing(self.tower), "batch", share_LE=share)


def _student() -> _Step:
    torch.manual_seed(6)
    model = get_peft_model(clip(), MoleConfig(lora_dropout=0.0, **REVISED))
    shake(model)
    return _Step(model)


def _train(step: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        step(pixels).backward()
        optimizer.step()
    return {name: p.detach() for name, p in step.named_parameters() if p.requires_grad}


def _worker(rank: int, folder: str, way: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    step: nn.Module = _student()
    if way == "ddp":
        step = DistributedDataParallel(step)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in step.tower.get_base_model().encoder.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(step, mesh=mesh)
        first = next(p for n, p in step.named_parameters() if "mole_fc1" in n)
        assert isinstance(first, DTensor)  # sharded indeed, not a quiet DDP
        assert first.to_local().numel() < first.numel()
    weights = _train(step, pixels(4)[2 * rank : 2 * rank + 2])
    whole = {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in weights.items()}
    torch.save({n.removeprefix("module."): w for n, w in whole.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fully_shard"])
def test_two_processes_train_as_one(way: str, tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path), way), nprocs=2)
    before = {n: p.detach() for n, p in _student().named_parameters() if p.requires_grad}
    expected = _train(_student(), pixels(4))
    assert any((expected[name] - before[name]).abs().max() > 1e-3 for name in before)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-5, msg=name)
