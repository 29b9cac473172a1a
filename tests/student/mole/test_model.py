"""Tests of movekd.student.mole.model: where the experts stand, and several adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from movekd.errors import ConfigError
from movekd.student.mole import MoleConfig, MoleLayer, clear_routing, routing
from small_tower import OFFICIAL, REVISED, TOWERS, build_tower, clip, pixels, shake, tokens

# PEFT 0.21 asks transformers 5.23 for a property by its old name; nothing here can change that.
# The old name of the switch is the only one that transformers 5.17 has too.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:FutureWarning")
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable")
]


def test_revised_student_is_clip_at_step_0_and_the_official_one_is_not() -> None:
    expected = tokens(clip().eval(), pixels())
    revised = get_peft_model(clip(), MoleConfig(**REVISED)).eval()
    assert torch.equal(tokens(revised, pixels()), expected)
    official = get_peft_model(clip(), MoleConfig(**OFFICIAL)).eval()
    assert (tokens(official, pixels()) - expected).abs().max() > 1e-4


def test_experts_stand_where_asked_and_the_base_is_frozen() -> None:
    model = get_peft_model(clip(), MoleConfig(**REVISED))
    layers = model.get_base_model().encoder.layers
    assert [isinstance(layer.mlp, MoleLayer) for layer in layers] == [True, True, False]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("mole_" in name), name
    tokens(model, pixels())
    assert len(routing(model)) == 2
    assert routing(model)[0].choice_BNE.shape == (2, 5, 3)
    assert torch.equal(routing(model)[1].choice_BNE, layers[1].mlp.routing.choice_BNE)
    clear_routing(model)
    assert all(layer.mlp.routing is None for layer in layers[:2])


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("recipe", [OFFICIAL, REVISED], ids=["official", "revised"])
def test_every_tower_is_a_student(name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Experts in its blocks and nowhere else; it learns, is saved, loaded and disabled."""

    def tokens(model: nn.Module) -> torch.Tensor:
        hidden: torch.Tensor = model(pixel_values=pixels()).last_hidden_state
        return hidden

    expected = tokens(build_tower(name).eval())
    model = get_peft_model(
        build_tower(name), MoleConfig(**(recipe | {"layers_to_transform": [0, 1, 2]}))
    )
    names = [name for name, module in model.named_modules() if isinstance(module, MoleLayer)]
    assert len(names) == 3
    assert not any("head" in name for name in names)
    assert torch.equal(tokens(model.eval()), expected) == (recipe is REVISED)
    shake(model)
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
    again = PeftModel.from_pretrained(build_tower(name), str(tmp_path)).eval()
    assert torch.equal(tokens(again), found)


def test_a_target_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="feed_forward"):
        get_peft_model(clip(), MoleConfig(r=2, target_modules=["feed_forward"]))


def test_two_adapters_take_turns_and_can_be_disabled(tmp_path: Path) -> None:
    base = tokens(clip().eval(), pixels())
    model = get_peft_model(clip(), MoleConfig(**REVISED)).eval()
    shake(model)
    one = tokens(model, pixels())

    other = MoleConfig(num_experts=2, r=4, init_lora_weights="kaiming", layers_to_transform=[1, 2])
    model.add_adapter("other", other)
    assert torch.equal(tokens(model, pixels()), one)  # adding does not activate
    frozen = [p for n, p in model.named_parameters() if ".other" in n]
    assert frozen
    assert not any(parameter.requires_grad for parameter in frozen)
    model.set_adapter("other")
    two = tokens(model, pixels())
    assert [record.choice_BNE.shape[-1] for record in routing(model)] == [2, 2]
    assert not torch.equal(one, two)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".other" in name), name

    model.set_adapter("default")
    assert torch.equal(tokens(model, pixels()), one)
    with model.disable_adapter():
        assert torch.equal(tokens(model, pixels()), base)
    assert torch.equal(tokens(model, pixels()), one)
    assert set(get_peft_model_state_dict(model, adapter_name="other")) == {
        name.replace("layers.0", "layers.2")
        for name in get_peft_model_state_dict(model, adapter_name="default")
    }
    with pytest.raises(ConfigError, match="default, other were made active together"):
        model.base_model.set_adapter(["default", "other"])

    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(tokens(model, pixels()), two)
    assert torch.equal(tokens(model.unload().eval(), pixels()), base)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload", "unmerge_adapter"])
def test_merging_is_refused_with_the_reason(verb: str) -> None:
    model = get_peft_model(clip(), MoleConfig(**REVISED))
    with pytest.raises(ConfigError, match="every token chooses its own expert"):
        getattr(model, verb)()


def test_adapters_by_sample_are_refused() -> None:
    model = get_peft_model(clip(), MoleConfig(**REVISED)).eval()
    model.add_adapter("other", MoleConfig(num_experts=2, r=2))
    expected = tokens(model, pixels())
    for names in (["other", "other"], ["default", "other"]):
        with pytest.raises(ConfigError, match=r"adapter_names=.*'default' for every sample"):
            model(pixel_values=pixels(), adapter_names=names)
    assert torch.equal(tokens(model, pixels()), expected)


def test_a_module_that_is_no_such_mlp_is_refused() -> None:
    with pytest.raises(ConfigError, match="CLIPAttention with the parts k_proj"):
        get_peft_model(clip(), MoleConfig(r=2, target_modules=["self_attn"]))
