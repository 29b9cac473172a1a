"""Name a student's parameters without what PEFT adds, and find its experts.

Used by exports and by the official format.
"""

import re
from typing import Any

from torch import Tensor, nn

from movekd.errors import ConfigError
from movekd.student.language_lora import is_adapter


def plain_name(name: str) -> str:
    """Return a parameter's name without PEFT's ``base_layer`` and adapter name."""
    name = name.replace(".base_layer.", ".")
    return re.sub(r"\.(mole_(?:fc1|fc2|router))\.[^.]+\.(\w+)$", r".\1.\2", name)


def plain_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model under their plain names.

    ``mlp.base_layer.fc1.weight`` is ``mlp.fc1.weight``, ``mlp.mole_fc1.default.lora_A`` is
    ``mlp.mole_fc1.lora_A``: the names of ``export.modeling_movekd``. LoRA on the language model is
    left out: see ``language_lora.adapter_parameters``.

    Raises:
        ConfigError: the tower has more than one MoLE adapter.
    """
    plain: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            continue
        short = plain_name(name)
        if short in plain:
            raise ConfigError(
                f"the tower has several MoLE adapters ('{name}' is one of two); expected one. "
                "Remove the others with delete_adapter before you export."
            )
        plain[short] = parameter.data
    return plain


def mole_layers(vlm: Any) -> dict[int, dict[str, Any]]:
    """Return num_experts, r, lora_alpha and use_gate of each block with experts, by its index."""
    layers: dict[int, dict[str, Any]] = {}
    for name, module in vlm.named_modules():
        block = re.search(r"\.(\d+)\.\w+$", name)
        if block is None or not hasattr(module, "mole_router"):
            continue
        mole_config = getattr(module, "mole_config", None)
        if mole_config is None:  # of export.modeling_movekd
            layers[int(block[1])] = module.experts
            continue
        (config,) = mole_config.values()
        layers[int(block[1])] = {
            "num_experts": config.num_all_experts,
            "r": config.r,
            "lora_alpha": float(config.lora_alpha),
            "use_gate": bool(config.use_gate),
        }
    return layers
