"""Tests of movekd.student.mole.restriction: a pass that may choose one teacher's expert."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from movekd.errors import ConfigError
from movekd.student.mole import (
    MoleConfig,
    checkpoint_contexts,
    restricted,
    routing,
)
from small_tower import REVISED, clip, pixels, shake, tokens

# PEFT 0.21 asks transformers 5.23 for a property by its old name; nothing here can change that.
# The old name of the switch is the only one that transformers 5.17 has too.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:FutureWarning")
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable")
]

TEACHERS = ["eva", "sam", "clip"]
NUM_SHARED = 2


def student(teachers: list[str] | None = None, **keys: Any) -> Any:
    """Return a small tower whose every trainable weight is away from its initial value."""
    torch.manual_seed(4)
    teachers = TEACHERS if teachers is None else teachers
    config = {"lora_dropout": 0.0, **REVISED, "num_experts": NUM_SHARED, "teachers": teachers}
    model = get_peft_model(clip(), MoleConfig(**(config | keys)))
    shake(model)
    return model.train()


def chosen(model: Any) -> Tensor:
    """Return how many tokens of all layers chose each expert."""
    return torch.stack([record.choice_BNE.sum((0, 1)) for record in routing(model)]).sum(0)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_restricted_pass_never_chooses_an_expert_of_another_teacher(teacher: str) -> None:
    model, own = student(), TEACHERS.index(teacher)
    tokens(model, pixels(16))
    free = chosen(model)
    assert (free > 0).all()  # unrestricted, every expert has tokens
    with restricted(model, teacher) as expert:
        tokens(model, pixels(16))
        found = chosen(model)
        probabilities = torch.stack([p for p, _ in routing(model)])
    assert expert == own
    others = [at for at in range(len(TEACHERS)) if at != own]
    assert found[others].sum() == 0
    assert (probabilities[..., others] == 0).all()
    assert found[own] > free[own]
    assert (found[len(TEACHERS) :] > 0).all()
    torch.testing.assert_close(chosen(model), free)  # the record of the free pass is back


@pytest.mark.parametrize("use_gate", [True, False])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_restricted_pass_is_that_of_a_tower_without_the_other_experts(
    teacher: str, use_gate: bool
) -> None:
    model = student(use_gate=use_gate)
    small = student([teacher], use_gate=use_gate)
    own = TEACHERS.index(teacher)
    kept = [own, *range(len(TEACHERS), len(TEACHERS) + NUM_SHARED)]
    weights = model.state_dict()
    of_experts = {n: w[kept] for n, w in weights.items() if ".mole_" in n}
    small.load_state_dict(weights | of_experts)
    with restricted(model, teacher):
        found = tokens(model, pixels(8))
    torch.testing.assert_close(found, tokens(small, pixels(8)))
    assert (found - tokens(model, pixels(8))).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", TEACHERS)
def test_it_has_no_gradient_to_another_teacher(teacher: str) -> None:
    model, own = student(), TEACHERS.index(teacher)
    with restricted(model, teacher):
        tokens(model, pixels(16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".mole_" in name:
            assert parameter.grad is not None, name
            for expert, gradient in enumerate(parameter.grad):
                may_learn = expert in (own, *range(len(TEACHERS), len(parameter.grad)))
                assert bool(gradient.ne(0).any()) == may_learn, (name, expert)


def passes(model: Any) -> Tensor:
    """Return a loss of a free pass and of one per teacher."""
    loss = tokens(model, pixels().requires_grad_()).square().mean()
    for weight, teacher in enumerate(TEACHERS, start=2):
        with restricted(model, teacher):
            loss = loss + weight * tokens(model, pixels().requires_grad_()).square().mean()
    return loss


def gradients(model: Any, times: int = 1) -> list[Tensor]:
    torch.manual_seed(5)  # dropout
    loss = passes(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(times):
        found = torch.autograd.grad(loss, trained, retain_graph=times > 1)
    assert all(layer.teacher is None for layer in model.modules() if hasattr(layer, "mole_router"))
    return list(found)


def test_a_block_that_is_computed_again_sees_its_restriction_again() -> None:
    plain = gradients(student(lora_dropout=0.3))
    model = student(lora_dropout=0.3)
    tower = model.get_base_model()
    keys = {"use_reentrant": False, "context_fn": checkpoint_contexts(tower)}
    tower.gradient_checkpointing_enable(keys)
    for times in (1, 2):  # a graph that is kept is computed again as well
        for one, two in zip(gradients(model, times), plain, strict=True):
            torch.testing.assert_close(one, two)
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(CheckpointError, match="different number of tensors"):
        gradients(model)  # without the contexts PyTorch finds another computation


@pytest.mark.slow
def test_restricted_passes_compile_without_graph_breaks() -> None:
    model = student()
    tower = model.get_base_model()
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for teacher in TEACHERS:
        with restricted(tower, teacher):
            found = compiled(pixels()).last_hidden_state
            torch.testing.assert_close(found, tower(pixels()).last_hidden_state)
    torch.testing.assert_close(
        compiled(pixels()).last_hidden_state, tower(pixels()).last_hidden_state
    )


def test_the_names_of_the_teachers_are_saved_and_come_back_through_peft(tmp_path: Path) -> None:
    model = student().eval()
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["teachers"], saved["num_experts"]) == (TEACHERS, NUM_SHARED)
    assert PeftConfig.from_pretrained(str(tmp_path)).teachers == TEACHERS
    again = PeftModel.from_pretrained(clip(), str(tmp_path)).eval()
    assert torch.equal(tokens(again, pixels()), tokens(model, pixels()))
    with restricted(model, "sam"):
        expected = tokens(model, pixels())
    with restricted(again, "sam"):
        assert torch.equal(tokens(again, pixels()), expected)


def test_a_teacher_without_an_expert_is_refused() -> None:
    model = student()
    with pytest.raises(ConfigError, match=r"expert of 'dino'.*has experts of clip, eva, sam"):
        restricted(model, "dino").__enter__()
    plain = get_peft_model(clip(), MoleConfig(**REVISED))
    with pytest.raises(ConfigError, match=r"has experts of no teacher"):
        restricted(plain, "clip").__enter__()
    with pytest.raises(KeyError), restricted(model, "sam"):
        raise KeyError
    tokens(model, pixels(16))
    assert (chosen(model) > 0).all()  # an error ends the restriction
