"""A tower on disk whose base learned beside its experts: two stock formats in one folder.

    DIRECTORY/
      adapter_config.json, adapter_model.safetensors    the experts, as PEFT writes them
      base/config.json, model.safetensors               the base, as transformers writes it

Nothing of movekd but the import that registers the tuner is needed to read it:

    base = CLIPVisionModel.from_pretrained(directory / "base")
    tower = PeftModel.from_pretrained(base, directory)

A run of ``movekd train`` has its own files (``student.checkpoint``), with the base's weights among
them.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel

from movekd.student.mole.model import base_is_saved, base_tensors


def save_tower(model: PeftModel, directory: Path) -> None:
    """Write all adapters of a tower and the base that they now stand on."""
    base: Any = model.get_base_model()
    base.save_pretrained(directory / "base", state_dict=base_tensors(base.state_dict()))
    sources = {name: config.base_model_name_or_path for name, config in model.peft_config.items()}
    try:
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(directory / "base")
        with base_is_saved():
            model.save_pretrained(str(directory))
    finally:
        for name, source in sources.items():
            model.peft_config[name].base_model_name_or_path = source
