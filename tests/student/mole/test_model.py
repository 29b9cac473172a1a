import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from movekd.distill import balance_loss, choice_share
from movekd.errors import ConfigError
from movekd.student.mole import MoleConfig, MoleLayer, clear_routing, routing, save_tower

# PEFT 0.21 asks transformers 5.23 for a property by its old name; nothing here can change that.
# The old name of the switch is the only one that transformers 5.17 has too.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:FutureWarning")
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable")
]

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
REVISED: dict[str, Any] = {"num_experts": 3, "r": 2, "layers_to_transform": [0, 1]}
OFFICIAL: dict[str, Any] = {
    "num_experts": 3,
    "r": 2,
    "lora_alpha": 1.0,
    "use_gate": False,
    "init_lora_weights": "kaiming",
}


def _clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **SMALL))


def _pixels(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _tokens(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    hidden_states: torch.Tensor = model(pixel_values=pixels, output_hidden_states=True)[
        "hidden_states"
    ][-2]
    return hidden_states[:, 1:]


def _shake(model: nn.Module, seed: int = 2) -> None:
    """Move every trainable parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_revised_student_is_clip_at_step_0_and_the_official_one_is_not() -> None:
    expected = _tokens(_clip().eval(), _pixels())
    revised = get_peft_model(_clip(), MoleConfig(**REVISED)).eval()
    assert torch.equal(_tokens(revised, _pixels()), expected)
    official = get_peft_model(_clip(), MoleConfig(**OFFICIAL)).eval()
    assert (_tokens(official, _pixels()) - expected).abs().max() > 1e-4


def test_experts_stand_where_asked_and_the_base_is_frozen() -> None:
    model = get_peft_model(_clip(), MoleConfig(**REVISED))
    layers = model.get_base_model().encoder.layers
    assert [isinstance(layer.mlp, MoleLayer) for layer in layers] == [True, True, False]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("mole_" in name), name
    _tokens(model, _pixels())
    assert len(routing(model)) == 2
    assert routing(model)[0].choice_BNE.shape == (2, 5, 3)
    assert torch.equal(routing(model)[1].choice_BNE, layers[1].mlp.routing.choice_BNE)
    clear_routing(model)
    assert all(layer.mlp.routing is None for layer in layers[:2])


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **SMALL)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=32, **SMALL)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, **SMALL)),
    "dinov2 with registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **SMALL)
    ),
}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("recipe", [OFFICIAL, REVISED], ids=["official", "revised"])
def test_every_tower_is_a_student(name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Experts in its blocks and nowhere else; it learns, is saved, loaded and disabled."""

    def tower() -> nn.Module:
        torch.manual_seed(0)
        return TOWERS[name]()

    def tokens(model: nn.Module) -> torch.Tensor:
        hidden: torch.Tensor = model(pixel_values=_pixels()).last_hidden_state
        return hidden

    expected = tokens(tower().eval())
    model = get_peft_model(tower(), MoleConfig(**(recipe | {"layers_to_transform": [0, 1, 2]})))
    names = [name for name, module in model.named_modules() if isinstance(module, MoleLayer)]
    assert len(names) == 3
    assert not any("head" in name for name in names)
    assert torch.equal(tokens(model.eval()), expected) == (recipe is REVISED)
    _shake(model)
    tokens(model.train()).square().mean().backward()
    (record, *_) = routing(model)
    assert record.choice_BNE.shape == (*expected.shape[:2], 3)
    trained = [p for n, p in model.named_parameters() if "mole_fc" in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.any() for p in trained if p.grad is not None)

    found = tokens(model.eval())
    assert not torch.allclose(found, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(tokens(model), expected)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tower(), str(tmp_path)).eval()
    assert torch.equal(tokens(again), found)


def test_a_target_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="feed_forward"):
        get_peft_model(_clip(), MoleConfig(r=2, target_modules=["feed_forward"]))


def test_an_adapter_alone_is_saved_and_comes_back_equal(tmp_path: Path) -> None:
    model = get_peft_model(_clip(), MoleConfig(**REVISED))
    _shake(model)
    model.eval()
    expected = _tokens(model, _pixels())
    model.save_pretrained(str(tmp_path))

    saved = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.encoder.layers.0.mlp."
    assert {name.removeprefix(first) for name in saved if name.startswith(first)} == {
        "mole_router.weight",
        "mole_router.bias",
        *(
            f"mole_{linear}.{part}"
            for linear in ("fc1", "fc2")
            for part in ("lora_A", "lora_A_bias", "lora_B", "lora_B_bias")
        ),
    }
    assert len(saved) == 20
    assert saved[first + "mole_fc1.lora_A"].shape == (3, 2, 16)
    assert saved[first + "mole_fc2.lora_B"].shape == (3, 2, 16)

    again = PeftModel.from_pretrained(_clip(), str(tmp_path)).eval()
    assert torch.equal(_tokens(again, _pixels()), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = PeftModel.from_pretrained(_clip(), str(tmp_path), is_trainable=True)
    assert sum(parameter.requires_grad for parameter in trainable.parameters()) == 20
    lean = PeftModel.from_pretrained(_clip(), str(tmp_path), low_cpu_mem_usage=True).eval()
    assert torch.equal(_tokens(lean, _pixels()), expected)


def _finetuned(has_frozen_since: bool) -> Any:
    """A tower whose experts and base took a training step."""
    model = get_peft_model(_clip(), MoleConfig(**REVISED))
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _tokens(model.train(), _pixels()).square().mean().backward()
    optimizer.step()
    return model.requires_grad_(not has_frozen_since).eval()


@pytest.mark.parametrize("has_frozen_since", [True, False])
def test_an_adapter_whose_base_learned_is_not_saved_alone(
    has_frozen_since: bool, tmp_path: Path
) -> None:
    model = _finetuned(has_frozen_since)
    with pytest.raises(ConfigError, match=r"weights of its base.*do not hold them.*save_tower"):
        model.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"trained as well \((base_model.model.)?embeddings"):
        get_peft_model_state_dict(model)
    assert not list(tmp_path.glob("*.safetensors"))


def _attention(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "self_attn" in n]


@pytest.mark.parametrize("way", ["plain", "checkpointed", "compiled", "transformers", "copied"])
def test_any_base_weight_that_learned_and_was_frozen_again_is_noticed(
    way: str, tmp_path: Path
) -> None:
    get_peft_model(_clip(), MoleConfig(**REVISED)).save_pretrained(str(tmp_path / "adapter"))
    if way == "transformers":
        model: Any = _clip()
        model.load_adapter(str(tmp_path / "adapter"))
    else:
        model = PeftModel.from_pretrained(_clip(), tmp_path / "adapter", is_trainable=True)
    if way == "copied":
        model = copy.deepcopy(model)
    tower: Any = model if way == "transformers" else model.get_base_model()
    if way == "checkpointed":
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    forward = tower
    if way == "compiled":
        forward = torch.compile(tower, fullgraph=True, backend="aot_eager")
    model.train()
    with torch.no_grad():
        tower(_pixels())
    forward(_pixels())
    model.save_pretrained(str(tmp_path / "frozen"))  # the base did not learn so far
    for parameter in _attention(tower):
        parameter.requires_grad_(True)
    model.eval()
    tower(_pixels())
    model.train()
    with torch.no_grad():
        tower(_pixels())
    for parameter in _attention(tower):
        parameter.requires_grad_(False)
    model.save_pretrained(str(tmp_path / "not trained"))
    for parameter in _attention(tower):
        parameter.requires_grad_(True)
    forward(_pixels()).last_hidden_state.square().mean().backward()
    with torch.no_grad():
        for parameter in _attention(tower):
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    for parameter in _attention(tower):
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"24 weights .* \(encoder.layers.0.self_attn.k_proj"):
        model.save_pretrained(str(tmp_path / "alone"))


def test_a_tower_that_transformers_gave_an_adapter_is_watched_as_well(tmp_path: Path) -> None:
    get_peft_model(_clip(), MoleConfig(**REVISED)).save_pretrained(str(tmp_path / "adapter"))
    tower = _clip()
    tower.load_adapter(str(tmp_path / "adapter"))
    tower.save_pretrained(str(tmp_path / "frozen"))
    assert (tmp_path / "frozen" / "adapter_model.safetensors").exists()
    tower.requires_grad_(True)
    with pytest.raises(ConfigError, match="Save the tower whole"):
        tower.save_pretrained(str(tmp_path / "trained"))


@pytest.mark.parametrize("has_frozen_since", [True, False])
def test_a_tower_whose_base_learned_is_saved_whole(has_frozen_since: bool, tmp_path: Path) -> None:
    model = _finetuned(has_frozen_since)
    model.add_adapter("other", MoleConfig(num_experts=2, r=4, init_lora_weights="kaiming"))
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = _tokens(model, _pixels())
    save_tower(model, tmp_path)

    base = CLIPVisionModel.from_pretrained(tmp_path / "base")
    fresh = _clip().state_dict()
    assert base.state_dict().keys() == fresh.keys()
    assert not torch.equal(
        base.encoder.layers[0].mlp.fc1.weight, fresh["encoder.layers.0.mlp.fc1.weight"]
    )
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(_tokens(again, _pixels()), expected["default"])
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter("other")
    assert torch.equal(_tokens(again, _pixels()), expected["other"])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    with pytest.raises(ConfigError, match="Save the tower whole"):  # still, by the other way
        model.save_pretrained(str(tmp_path / "alone"))


def test_transformers_loads_the_adapter_by_itself(tmp_path: Path) -> None:
    model = get_peft_model(_clip(), MoleConfig(**REVISED))
    _shake(model)
    model.save_pretrained(str(tmp_path))
    tower = _clip()
    tower.load_adapter(str(tmp_path))
    assert torch.equal(_tokens(tower.eval(), _pixels()), _tokens(model.eval(), _pixels()))


def test_two_adapters_take_turns_and_can_be_disabled(tmp_path: Path) -> None:
    base = _tokens(_clip().eval(), _pixels())
    model = get_peft_model(_clip(), MoleConfig(**REVISED)).eval()
    _shake(model)
    one = _tokens(model, _pixels())

    other = MoleConfig(num_experts=2, r=4, init_lora_weights="kaiming", layers_to_transform=[1, 2])
    model.add_adapter("other", other)
    assert torch.equal(_tokens(model, _pixels()), one)  # adding does not activate
    frozen = [p for n, p in model.named_parameters() if ".other" in n]
    assert frozen
    assert not any(parameter.requires_grad for parameter in frozen)
    model.set_adapter("other")
    two = _tokens(model, _pixels())
    assert [record.choice_BNE.shape[-1] for record in routing(model)] == [2, 2]
    assert not torch.equal(one, two)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".other" in name), name

    model.set_adapter("default")
    assert torch.equal(_tokens(model, _pixels()), one)
    with model.disable_adapter():
        assert torch.equal(_tokens(model, _pixels()), base)
    assert torch.equal(_tokens(model, _pixels()), one)
    assert set(get_peft_model_state_dict(model, adapter_name="other")) == {
        name.replace("layers.0", "layers.2")
        for name in get_peft_model_state_dict(model, adapter_name="default")
    }
    with pytest.raises(ConfigError, match="default, other were made active together"):
        model.base_model.set_adapter(["default", "other"])

    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(_tokens(model, _pixels()), two)
    assert torch.equal(_tokens(model.unload().eval(), _pixels()), base)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload", "unmerge_adapter"])
def test_merging_is_refused_with_the_reason(verb: str) -> None:
    model = get_peft_model(_clip(), MoleConfig(**REVISED))
    with pytest.raises(ConfigError, match="every token chooses its own expert"):
        getattr(model, verb)()


def test_adapters_by_sample_are_refused() -> None:
    model = get_peft_model(_clip(), MoleConfig(**REVISED)).eval()
    model.add_adapter("other", MoleConfig(num_experts=2, r=2))
    expected = _tokens(model, _pixels())
    for names in (["other", "other"], ["default", "other"]):
        with pytest.raises(ConfigError, match=r"adapter_names=.*'default' for every sample"):
            model(pixel_values=_pixels(), adapter_names=names)
    assert torch.equal(_tokens(model, _pixels()), expected)


def test_a_module_that_is_no_such_mlp_is_refused() -> None:
    with pytest.raises(ConfigError, match="CLIPAttention with the parts k_proj"):
        get_peft_model(_clip(), MoleConfig(r=2, target_modules=["self_attn"]))


def test_a_half_precision_tower_trains_experts_in_float32() -> None:
    model = get_peft_model(_clip().bfloat16(), MoleConfig(**REVISED))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    tokens = _tokens(model, _pixels().bfloat16())
    assert tokens.dtype == torch.bfloat16
    tokens.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("config", [OFFICIAL, REVISED], ids=["official", "revised"])
def test_checkpointing_the_tower_changes_no_gradient(config: dict[str, Any]) -> None:
    def step(is_checkpointed: bool) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(4)
        model = get_peft_model(_clip(), MoleConfig(**config))
        _shake(model)
        model.train()
        if is_checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)  # dropout
        loss = _tokens(model, _pixels().requires_grad_()).square().mean()
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
    model = get_peft_model(_clip(), MoleConfig(lora_dropout=0.0, **config))
    _shake(model)
    tower = model.get_base_model()
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]

    def step(forward: Callable[..., Any]) -> list[torch.Tensor]:
        loss = forward(_pixels()).last_hidden_state.square().mean()
        loss = loss + balance_loss(routing(tower), "batch")
        return [loss, *torch.autograd.grad(loss, trained)]

    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for one, two in zip(step(compiled), step(tower), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    tower.eval()
    with torch.no_grad():
        found = compiled(_pixels()).last_hidden_state
        torch.testing.assert_close(found, tower(_pixels()).last_hidden_state)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_tower_trains_under_bfloat16_autocast(is_checkpointed: bool) -> None:
    model = get_peft_model(_clip(), MoleConfig(lora_dropout=0.0, **REVISED))
    _shake(model)
    if is_checkpointed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = _tokens(model, _pixels().requires_grad_())
        loss = tokens.float().square().mean() + balance_loss(routing(model), "batch")
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
        task = _tokens(self.tower, pixels).square().mean()
        share = choice_share(routing(self.tower))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(share)
            share /= torch.distributed.get_world_size()
        return task + balance_loss(routing(self.tower), "batch", share_LE=share)


def _student() -> _Step:
    torch.manual_seed(6)
    model = get_peft_model(_clip(), MoleConfig(lora_dropout=0.0, **REVISED))
    _shake(model)
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
    weights = _train(step, _pixels(4)[2 * rank : 2 * rank + 2])
    whole = {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in weights.items()}
    torch.save({n.removeprefix("module."): w for n, w in whole.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fully_shard"])
def test_two_processes_train_as_one(way: str, tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path), way), nprocs=2)
    before = {n: p.detach() for n, p in _student().named_parameters() if p.requires_grad}
    expected = _train(_student(), _pixels(4))
    assert any((expected[name] - before[name]).abs().max() > 1e-3 for name in before)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-5, msg=name)
