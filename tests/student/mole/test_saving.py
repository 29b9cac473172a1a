"""Tests of movekd.student.mole.saving: adapters and towers on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    CLIPVisionModel,
)

from movekd.errors import ConfigError
from movekd.student.mole import MoleConfig, save_tower
from small_tower import REVISED, clip, pixels, shake, tokens

# PEFT 0.21 asks transformers 5.23 for a property by its old name; nothing here can change that.
# The old name of the switch is the only one that transformers 5.17 has too.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:FutureWarning")
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable")
]


def test_an_adapter_alone_is_saved_and_comes_back_equal(tmp_path: Path) -> None:
    model = get_peft_model(clip(), MoleConfig(**REVISED))
    shake(model)
    model.eval()
    expected = tokens(model, pixels())
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

    again = PeftModel.from_pretrained(clip(), str(tmp_path)).eval()
    assert torch.equal(tokens(again, pixels()), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = PeftModel.from_pretrained(clip(), str(tmp_path), is_trainable=True)
    assert sum(parameter.requires_grad for parameter in trainable.parameters()) == 20
    lean = PeftModel.from_pretrained(clip(), str(tmp_path), low_cpu_mem_usage=True).eval()
    assert torch.equal(tokens(lean, pixels()), expected)


def _finetuned(has_frozen_since: bool) -> Any:
    """A tower whose experts and base took a training step."""
    model = get_peft_model(clip(), MoleConfig(**REVISED))
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens(model.train(), pixels()).square().mean().backward()
    optimizer.step()
    return model.requires_grad_(not has_frozen_since).eval()


def test_an_adapter_whose_base_is_trainable_is_not_saved_alone(tmp_path: Path) -> None:
    model = _finetuned(has_frozen_since=False)
    with pytest.raises(ConfigError, match=r"weights of the base.*do not hold them.*save_tower"):
        model.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"are trainable \((base_model.model.)?embeddings"):
        get_peft_model_state_dict(model)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_tower_that_transformers_gave_an_adapter_is_checked_as_well(tmp_path: Path) -> None:
    get_peft_model(clip(), MoleConfig(**REVISED)).save_pretrained(str(tmp_path / "adapter"))
    tower = clip()
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
        expected[name] = tokens(model, pixels())
    save_tower(model, tmp_path)

    base = CLIPVisionModel.from_pretrained(tmp_path / "base")
    fresh = clip().state_dict()
    assert base.state_dict().keys() == fresh.keys()
    assert not torch.equal(
        base.encoder.layers[0].mlp.fc1.weight, fresh["encoder.layers.0.mlp.fc1.weight"]
    )
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(tokens(again, pixels()), expected["default"])
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter("other")
    assert torch.equal(tokens(again, pixels()), expected["other"])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    if not has_frozen_since:  # still trainable, and still refused by the other way
        assert all(p.requires_grad for n, p in model.named_parameters() if ".mole_" not in n)
        with pytest.raises(ConfigError, match="Save the tower whole"):
            model.save_pretrained(str(tmp_path / "alone"))


def test_transformers_loads_the_adapter_by_itself(tmp_path: Path) -> None:
    model = get_peft_model(clip(), MoleConfig(**REVISED))
    shake(model)
    model.save_pretrained(str(tmp_path))
    tower = clip()
    tower.load_adapter(str(tmp_path))
    assert torch.equal(tokens(tower.eval(), pixels()), tokens(model.eval(), pixels()))
