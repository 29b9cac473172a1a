"""Save a tower whose base was trained as well: two stock formats in one folder.

    DIRECTORY/
      adapter_config.json, adapter_model.safetensors    the experts, as PEFT writes them
      base/config.json, model.safetensors               the base, as transformers writes it

PEFT and transformers read it, once ``movekd.student`` is imported:

    base = CLIPVisionModel.from_pretrained(directory / "base")
    tower = PeftModel.from_pretrained(base, directory)

A run of ``movekd train`` writes other files, see ``student.checkpoint``.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel

from movekd.student.mole.model import base_tensors, trainable_base


def save_tower(model: PeftModel, directory: Path) -> None:
    """Write all adapters of a tower, and its base."""
    base: Any = model.get_base_model()
    base.save_pretrained(directory / "base", state_dict=base_tensors(base.state_dict()))
    sources = {name: config.base_model_name_or_path for name, config in model.peft_config.items()}
    trainable = trainable_base(model).values()
    try:
        for parameter in trainable:  # or MoleModel refuses to save the adapters
            parameter.requires_grad_(False)
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(directory / "base")
        model.save_pretrained(str(directory))
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for name, source in sources.items():
            model.peft_config[name].base_model_name_or_path = source
