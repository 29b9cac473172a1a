"""Describe released checkpoints, and check one: its config.json, every name and every shape.

Input: a config.json and the headers of weight files. Output: the configs of the parts, a student
without values, or an error that names what does not fit. ``import_checkpoint`` calls this module
before it writes anything.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from movekd.config import validate
from movekd.errors import ConfigError, WeightsError, shorten
from movekd.student.config import PromptFormat, StudentConfig
from movekd.student.hf_loading import loading
from movekd.student.official.state_dict import (
    adapter_shapes,
    official_views,
    require_exact,
)
from movekd.student.parameters import plain_name
from movekd.student.tensor_files import TensorFiles
from movekd.student.vlm import mole_config

MODEL_TYPE = "move_llava_llama"
ARCHITECTURE = "MoVELlavaLlamaForCausalLM"
PROJECTOR_TYPE = "mlp2x_gelu"
STAGE_1_FILES = {
    "projector": "mm_projector.bin",
    "mole": "mole_encoder.bin",
    "adapters": "encoder_adapter.bin",
}

ORIGINALS = "official"
"""Folder of an imported model with the released small files, unchanged."""
DTYPES_FILE = "dtypes.json"
BUFFERS_FILE = "buffers.safetensors"
ASPECT_RATIOS = {"pad": "pad", "crop": "square"}
"""Geometry here -> LLaVA's image_aspect_ratio."""

TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("attention_bias", "attention_dropout", "mlp_bias", "head_dim", "tie_word_embeddings"),
)
"""Keys of a Llama's config.json, without its rotary embedding."""

CLIP_L_336 = "openai/clip-vit-large-patch14-336"
CLIP_L_336_KEYS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
"""The tower of every released model, so that an import needs no network."""

OLD_BUFFERS = (".embeddings.position_ids", ".rotary_emb.inv_freq")
"""Ends of the names of buffers that older transformers saved and newer ones compute."""


def require_supported(keys: Mapping[str, Any], path: Path) -> None:
    """Check that a config.json describes what movekd computes.

    Raises:
        ConfigError: names the key, what it says, and what was expected.
    """
    moe = keys.get("moe")
    moe = moe if isinstance(moe, dict) else {}
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model_type": (keys.get("model_type"), (MODEL_TYPE,)),
        "moe.moe_encoder": (moe.get("moe_encoder"), (True,)),
        "moe.moe_encoder_dense": (moe.get("moe_encoder_dense", False), (False,)),
        "mm_projector_type": (keys.get("mm_projector_type"), (PROJECTOR_TYPE,)),
        "mm_vision_select_feature": (keys.get("mm_vision_select_feature", "patch"), ("patch",)),
        "mm_use_im_start_end": (keys.get("mm_use_im_start_end", False), (False, None)),
        "image_aspect_ratio": (
            keys.get("image_aspect_ratio", "square"),
            (None, *ASPECT_RATIOS.values()),
        ),
    }
    for key, (found, known) in expected.items():
        if found not in known:
            wanted = " or ".join(repr(value) for value in known if value is not None)
            raise ConfigError(
                f"{path} has {key} {shorten(repr(found))}; expected {wanted}, as in the released "
                "models. movekd computes no other kind."
            )


def student_config(keys: Mapping[str, Any], dtype: str, prompt: PromptFormat) -> StudentConfig:
    """Return the student that a config.json describes, with its base models beside it.

    Raises:
        ConfigError: a value is out of range.
    """
    moe = keys.get("moe") or {}
    content = {
        "vision_tower": "base/vision_tower",
        "language_model": "base/language_model",
        "vision_feature_layer": keys.get("mm_vision_select_layer", -2),
        "mole": {
            "num_experts": moe.get("moe_encoder_num_experts", 3),
            "r": moe.get("moe_encoder_lora_rank", 32),
            "lora_alpha": moe.get("moe_encoder_lora_alpha", 1),
            "use_gate": False,
            "init_lora_weights": "kaiming",
            "layers_to_transform": "all",
            "balance": "sample",
        },
        "prompt": prompt,
        "dtype": dtype,
    }
    return validate(StudentConfig, content, "the student of config.json")


def experts_of(tensors: TensorFiles) -> dict[str, Any]:
    """Return number and rank of the experts, from the first block's own tensors."""
    first = [n for n in tensors if ".layers.0.mlp.moe_down." in n and n.endswith("lora_A.weight")]
    return {
        "moe_encoder_num_experts": max(1, len(first)),
        "moe_encoder_lora_rank": tensors.shape(first[0])[0] if first else 32,
        "moe_encoder_lora_alpha": 1,
    }


def clip_config(source: str) -> Any:
    """Return the config of a vision tower; that of the released models needs no network.

    Raises:
        WeightsError: it cannot be found.
    """
    if source == CLIP_L_336:
        return CLIPVisionConfig(**CLIP_L_336_KEYS)
    if "/" not in source and not os.path.isdir(source):
        raise WeightsError(
            f"config.json names the vision tower '{shorten(source)}', a folder of the machine that "
            "wrote it; give the hub id or directory of the CLIP with --vision-tower."
        )
    with loading(source, "the vision tower"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return getattr(config, "vision_config", config)


def text_config(keys: Mapping[str, Any]) -> Any:
    """Return the config of the language model that a config.json describes."""
    given = {
        key: keys[key]
        for key in (*TEXT_KEYS, "rope_theta", "rope_scaling")
        if keys.get(key) is not None
    }
    with loading("config.json", "the language model of"):
        return LlamaConfig(**given)


def skeleton(vision_config: Any, text_config: Any, student: StudentConfig) -> Any:
    """Return the student without values: only names and shapes."""
    with loading("config.json", "the model of"):
        config = LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            projector_hidden_act="gelu",
            vision_feature_layer=student.vision_feature_layer,
        )
    with loading("config.json", "the model of"), torch.device("meta"):
        vlm = LlavaForConditionalGeneration(config)
        experts = mole_config(student, vision_config.num_hidden_layers)
        inject_adapter_in_model(experts, vlm.model.vision_tower)
    return vlm


def check_weights(
    tensors: TensorFiles,
    parameters: Mapping[str, Tensor],
    buffers: list[str],
    vision_config: Any,
    source: Path,
) -> list[str]:
    """Check every name and shape; return the names of the adapters.

    Raises:
        WeightsError: something is missing, unexpected or of another shape.
    """
    found = {name: tensors.shape(name) for name in tensors if name not in buffers}
    views = official_views({plain_name(n): p.data for n, p in parameters.items()})
    expected = {name: tuple(view.shape) for name, view in views.items()}
    num_tokens = (vision_config.image_size // vision_config.patch_size) ** 2
    adapters = adapter_shapes(found, vision_config.hidden_size, num_tokens)
    require_exact(found, expected | adapters, str(source))
    return sorted(adapters)


def common_dtype(tensors: TensorFiles) -> str:
    """Return the dtype that holds every tensor exactly."""
    dtypes = {tensors.dtype(name) for name in tensors if not name.endswith(OLD_BUFFERS)}
    unknown = dtypes - {torch.float32, torch.float16, torch.bfloat16}
    if unknown:
        raise WeightsError(
            f"the checkpoint holds weights of {', '.join(map(str, sorted(unknown, key=str)))}; "
            "expected float32, float16 or bfloat16. Quantised ones are not supported."
        )
    only = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return str(only).removeprefix("torch.")
