"""Write a finetuned run from the untrained models of digits: meaningless but fixed answers."""

import json
from pathlib import Path

import torch

import scenes
from movekd.student.checkpoint import PART_FILES, save_parts
from movekd.student.config import MoleKeys, PromptFormat, StudentConfig
from movekd.student.vlm import build_vlm

WEIGHTS = Path(scenes.__file__).parent / "weights"


def write_run(folder: Path, prompt: PromptFormat = "chat_template") -> Path:
    """Write ``folder/model`` as `movekd train` does; return ``folder``."""
    config = StudentConfig(
        vision_tower=str(WEIGHTS / "clip"),
        language_model=str(WEIGHTS / "language_model"),
        mole=MoleKeys(
            r=4, lora_alpha=1, use_gate=True, init_lora_weights="zero", layers_to_transform="read"
        ),
        prompt=prompt,
    )
    torch.manual_seed(5)
    student = build_vlm(config)
    save_parts(folder / "model", student.vlm, list(PART_FILES))
    student.tokenizer.save_pretrained(folder / "model")
    keys = {"student": config.model_dump(mode="json"), "data": {"geometry": "crop"}}
    (folder / "model" / "config.yaml").write_text(json.dumps(keys))
    return folder
