"""Put LoRA on the language model with PEFT, and name its tensors as PEFT's own files do.

    MODEL/language_model_lora/
      adapter_config.json         as PEFT writes it; names the base model
      adapter_model.safetensors   the adapter

Stock PEFT loads the folder onto the stock base:

    base = AutoModelForCausalLM.from_pretrained(base_model)
    model = PeftModel.from_pretrained(base, "MODEL/language_model_lora")

In an export the same folder fits the LLaVA around the language model. Input: a LLaVA whose language
model is loaded. Used by ``vlm.build_vlm``, ``checkpoint`` and ``export``. The adapter is float32,
whatever the dtype of its base.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from safetensors.torch import save_file
from torch import nn

from movekd.errors import ConfigError, did_you_mean, shorten
from movekd.student.config import LanguageModelLoraKeys

LORA_PART = "language_model_lora"
"""The part of a model directory that holds the adapter."""
LORA_DIR = "language_model_lora"
LORA_FILE = f"{LORA_DIR}/adapter_model.safetensors"
LORA_CONFIG_FILE = f"{LORA_DIR}/adapter_config.json"

_LANGUAGE_MODEL = "model.language_model."
_IN_PEFT = "base_model.model.model."
"""The same place in a ``PeftModel`` around a causal language model."""


def add_adapter(vlm: Any, keys: LanguageModelLoraKeys) -> LoraModel:
    """Put a new LoRA on the language model of a LLaVA, in place; return PEFT's tuner.

    At first the model computes what it did before, because the second factor is zero. The first
    factor takes its random numbers from torch's current seed.

    Raises:
        ConfigError: ``target_modules`` names what the language model does not have.
    """
    language_model = vlm.model.language_model
    config = LoraConfig(
        r=keys.r,
        lora_alpha=keys.lora_alpha,
        lora_dropout=keys.lora_dropout,
        target_modules=target_modules(language_model, keys),
        task_type="CAUSAL_LM",
    )
    tuner = LoraModel(language_model, config, "default")
    cast_adapter_dtype(language_model, "default")
    return tuner


@contextmanager
def merging(vlm: Any, keys: LanguageModelLoraKeys) -> Iterator[None]:
    """Give the language model an adapter, and merge it into the weights at the end of the block.

    The sum is computed in float32 and rounded once to the dtype of the weights.
    """
    tuner = add_adapter(vlm, keys)
    yield
    tuner.merge_and_unload()


def has_adapter(vlm: Any) -> bool:
    """Return whether a model has a LoRA on its language model."""
    language_model = getattr(vlm.model, "language_model", None)  # an encoder has none
    return language_model is not None and hasattr(language_model, "peft_config")


def is_adapter(name: str) -> bool:
    """Return whether a parameter of a LLaVA belongs to the language model's adapter."""
    return name.startswith(_LANGUAGE_MODEL) and ".lora_" in name


def adapter_parameters(vlm: nn.Module, *, in_llava: bool = False) -> dict[str, nn.Parameter]:
    """Return the adapter under the names of PEFT's files.

    Args:
        vlm: the LLaVA.
        in_llava: name them for the whole LLaVA; otherwise for the language model by itself.
    """
    end = re.compile(r"\.default\.weight$")
    old, new = ("", "base_model.model.") if in_llava else (_LANGUAGE_MODEL, _IN_PEFT)
    return {
        new + end.sub(".weight", name.removeprefix(old)): parameter
        for name, parameter in vlm.named_parameters()
        if is_adapter(name)
    }


def base_name(name: str) -> str:
    """Return the name that a parameter of the language model has without an adapter around it."""
    return name.replace(".base_layer.", ".")


def write_adapter_config(vlm: Any, directory: Path, *, names_base: bool) -> None:
    """Write PEFT's ``adapter_config.json`` for the language model by itself.

    Args:
        vlm: the model.
        directory: the adapter's folder.
        names_base: whether the base is as it was published, so that its name says which it is.
    """
    config = _saved_config(vlm)
    base = vlm.config.text_config.name_or_path
    config.base_model_name_or_path = base if names_base else None
    config.save_pretrained(str(directory))


def write_llava_adapter(vlm: Any, directory: Path) -> None:
    """Write the adapter as PEFT loads it onto the whole LLaVA."""
    config = _saved_config(vlm)
    names = "|".join(map(re.escape, config.target_modules))
    config.target_modules = rf"model\.language_model\..*\.({names})"  # the tower has a q_proj, too
    config.task_type = None
    config.save_pretrained(str(directory))
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(vlm, in_llava=True).items()
    }
    save_file(tensors, directory / Path(LORA_FILE).name, metadata={"format": "pt"})


def adapter_keys(vlm: Any) -> LanguageModelLoraKeys:
    """Return the keys of a model's adapter."""
    config = _saved_config(vlm)
    return LanguageModelLoraKeys(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
    )


def _saved_config(vlm: Any) -> Any:
    config = copy.copy(vlm.model.language_model.peft_config["default"])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order would be random
    return config


def target_modules(language_model: nn.Module, keys: LanguageModelLoraKeys) -> list[str]:
    """Return the names of the linear layers that get an adapter.

    Raises:
        ConfigError: a name is not one of the language model's linear layers.
    """
    layers = [n for n, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name in layers})
    if keys.target_modules == "all-linear":
        return known
    for name in keys.target_modules:
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            raise ConfigError(
                f"student.language_model_lora.target_modules names '{shorten(name, 80)}'; expected "
                f"linear layers of the language model's blocks: {shorten(', '.join(known), 300)}."
                f"{did_you_mean(name, known)}"
            )
    return list(keys.target_modules)
