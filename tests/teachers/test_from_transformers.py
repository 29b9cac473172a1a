"""Vision models out of larger checkpoints, and under the names that they were published with."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from movekd.cache.spec import CacheSpec
from movekd.teachers import load_teacher
from movekd.teachers.teacher import weights_sha256

Shrink = Callable[..., CacheSpec]


def save(model: Any, path: Path, rename: Callable[[str], str]) -> str:
    """Save a model with some other names for its tensors."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    transformers.utils.logging.enable_progress_bar()
    # save_pretrained may write older names by itself; here they are the caller's business.
    renamed = {rename(name): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def test_siglip_is_found_in_a_whole_checkpoint(tmp_path: Path, shrunken: Shrink) -> None:
    """Published SigLIP 2 is a SiglipModel, text side and all."""
    spec = shrunken("siglip2")
    vision = {key: value for key, value in spec.model_args.items() if key != "model_type"}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 9}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config=vision,
            text_config={**text, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
        )
    )
    path = save(model, tmp_path, lambda name: name)
    assert any(
        name.startswith("vision_model.") for name in load_file(tmp_path / "model.safetensors")
    )
    teacher = load_teacher(spec.with_changes(weights=path))
    assert teacher.weights_sha256 == weights_sha256(model.vision_model)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_dinov3_loads_under_its_older_names(prefix: str, tmp_path: Path, shrunken: Shrink) -> None:
    """Published before transformers 5 moved the blocks from ``layer`` to ``model.layer``."""
    teacher = load_teacher(shrunken("dinov3"))
    path = save(teacher.module, tmp_path, lambda name: re.sub(r"^model\.", prefix, name))
    assert f"{prefix}layer.0.norm1.weight" in load_file(tmp_path / "model.safetensors")
    loaded = load_teacher(shrunken("dinov3", weights=path, seed=1))
    assert loaded.weights_sha256 == teacher.weights_sha256
