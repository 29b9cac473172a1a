"""Write the parts of an imported model: the tower's base, the language model, what was trained.

``import_checkpoint`` has checked names and shapes. Values are copied unchanged, one tensor at a
time: ``parameters`` has movekd's names, ``tensors`` the official ones.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from movekd.student.checkpoint import ADAPTERS_FILE, part_of
from movekd.student.official.schema import BUFFERS_FILE, DTYPES_FILE
from movekd.student.official.state_dict import (
    adapters_from_official,
    official_name,
    official_views,
)
from movekd.student.parameters import plain_name
from movekd.student.tensor_files import TensorFiles, write_shards
from movekd.student.tokenizer import TOKENIZER_FILES, forget_calls

SMALL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *TOKENIZER_FILES,
)


def write_tower(
    directory: Path,
    config: Any,
    source: str,
    parameters: Mapping[str, Tensor],
    tensors: TensorFiles,
) -> None:
    """Write the tower's base weights, its config and its preprocessor_config.json.

    ``source``, a hub id or directory, may hold a preprocessor_config.json; CLIP's stands in for it.
    """
    names = {
        plain_name(name).removeprefix("model.vision_tower."): official_name(
            plain_name(name), ".base_layer." in name
        )
        for name in parameters
        if part_of(name) == "vision_tower"
    }
    _write_base(directory, names, tensors)
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(directory)
    preprocessor = Path(source) / "preprocessor_config.json"
    if preprocessor.exists():
        shutil.copyfile(preprocessor, directory / preprocessor.name)
        return
    keys = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": config.image_size},
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
    }
    text = json.dumps(keys, indent=2) + "\n"
    (directory / preprocessor.name).write_text(text, encoding="utf-8")


def write_language_model(
    directory: Path,
    config: Any,
    tokenizer: Any,
    parameters: Mapping[str, Tensor],
    tensors: TensorFiles,
) -> None:
    """Write the language model, with a row of zeros for each token that is new.

    No answer depends on those rows: the model replaces an image's tokens before it reads them, and
    may not generate them.
    """
    names = {
        official_name(name, False): official_name(name, False)
        for name in parameters
        if part_of(name) == "language_model"
    }
    num_new = max(0, len(tokenizer) - config.vocab_size)
    _write_base(directory, names, tensors, num_new)
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=list(range(config.vocab_size, config.vocab_size + num_new)) or None,
    )
    generation.save_pretrained(directory)
    config.vocab_size += num_new
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    forget_calls(tokenizer).save_pretrained(directory)


def _write_base(
    directory: Path, names: Mapping[str, str], tensors: TensorFiles, num_new_rows: int = 0
) -> None:
    """Write tensors under other names, with more rows in the vocabulary's."""

    def rows(name: str) -> int:
        return num_new_rows if name in ("model.embed_tokens.weight", "lm_head.weight") else 0

    def read(name: str) -> Tensor:
        tensor = tensors[names[name]]
        new = tensor.new_zeros(rows(name), *tensor.shape[1:])
        return torch.cat([tensor, new]) if rows(name) else tensor

    def shape(name: str) -> Tensor:
        first, *others = tensors.shape(names[name])
        dtype = tensors.dtype(names[name])
        return torch.empty(first + rows(name), *others, dtype=dtype, device="meta")

    write_shards(directory, {name: shape(name) for name in names}, read)


def write_part(
    path: Path, part: str, parameters: Mapping[str, Tensor], tensors: TensorFiles
) -> None:
    """Write the experts, or the projector, as a run does."""
    named = {name: plain_name(name) for name in parameters if part_of(name) == part}
    found = official_views({plain: parameters[name].data for name, plain in named.items()})
    dtypes = {tensors.dtype(name) for name in found}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    filled = {
        name: torch.empty(parameters[name].shape, dtype=dtype, device="cpu") for name in named
    }
    for name, view in official_views({named[name]: t for name, t in filled.items()}).items():
        view.copy_(tensors[name])
    save_file(filled, path, metadata={"format": "pt"})


def write_adapters(model_dir: Path, official: Mapping[str, Tensor]) -> None:
    """Write the teachers' adapters under movekd's names, if the checkpoint has any."""
    if official:
        ours = {n: t.contiguous() for n, t in adapters_from_official(official).items()}
        save_file(ours, model_dir / ADAPTERS_FILE, metadata={"format": "pt"})


def write_originals(
    directory: Path, source: Path, tensors: TensorFiles, buffers: list[str], dtype: str
) -> None:
    """Keep what an export needs: small files, old buffers, other dtypes than ``dtype``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if buffers:
        kept = {name: tensors[name].contiguous() for name in buffers}
        save_file(kept, directory / BUFFERS_FILE, metadata={"format": "pt"})
    others = {n: str(tensors.dtype(n)).removeprefix("torch.") for n in tensors if n not in buffers}
    if set(others.values()) != {dtype}:
        text = json.dumps(others, indent=1) + "\n"
        (directory / DTYPES_FILE).write_text(text, encoding="utf-8")
