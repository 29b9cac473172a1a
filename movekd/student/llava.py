"""Make a LLaVA with a new projector, for a vision tower and a language model to be put into.

Used by ``vlm.build_vlm``. The classes are transformers' own where these compute the student;
another projector needs the classes of ``export.modeling_movekd``.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from movekd.corpus.anyres import TILE
from movekd.errors import ConfigError
from movekd.student.config import StudentConfig
from movekd.student.export.modeling_movekd import (
    MovekdLlavaForConditionalGeneration,
    MovekdLlavaNextForConditionalGeneration,
)
from movekd.student.llava_next import GRID_PINPOINTS
from movekd.student.projector import prompt_grid
from movekd.student.towers import num_prefix_tokens

LLAVA_CLASSES: dict[tuple[str, str], Any] = {
    ("llava", "mlp2x_gelu"): LlavaForConditionalGeneration,
    ("llava", "pixel_shuffle"): MovekdLlavaForConditionalGeneration,
    ("llava_next", "mlp2x_gelu"): LlavaNextForConditionalGeneration,
    ("llava_next", "pixel_shuffle"): MovekdLlavaNextForConditionalGeneration,
}
"""``model_type`` and ``projector_type`` of a config.json -> the model's class."""


def llava_class(config_json: dict[str, Any]) -> Any:
    """Return the class of a LLaVA by the keys of its config.json; None: it is another model."""
    names = (config_json.get("model_type"), config_json.get("projector_type", "mlp2x_gelu"))
    return LLAVA_CLASSES.get((str(names[0]), str(names[1])))


def new_llava(
    config: StudentConfig, vision_config: Any, text_config: Any, image_token_index: int
) -> Any:
    """Return a LLaVA of which only the projector has weights; the rest is on the meta device.

    The projector takes its random numbers from torch's current seed.

    Args:
        config: the student.
        vision_config: the tower's.
        text_config: the language model's.
        image_token_index: the token that stands for an image.

    Raises:
        ConfigError: the tower does not fit the architecture or the projector.
    """
    keys: dict[str, Any] = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": image_token_index,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": (
            "default" if num_prefix_tokens(vision_config) == 1 else "full"
        ),
        "image_seq_length": prompt_grid(config.projector_type, vision_config) ** 2,
        "tie_word_embeddings": False,
    }
    if config.projector_type != "mlp2x_gelu":  # which the configs of transformers do not name
        keys["projector_type"] = config.projector_type
    if config.architecture == "llava_next":
        if vision_config.image_size != TILE:
            raise ConfigError(
                f"student.vision_tower '{config.vision_tower}' looks at {vision_config.image_size} "
                f"pixels; student.architecture: llava_next cuts tiles of {TILE}. Take a tower of "
                f"{TILE} pixels, or architecture: llava."
            )
        keys["image_grid_pinpoints"] = GRID_PINPOINTS
    model_class = LLAVA_CLASSES[config.architecture, config.projector_type]
    with torch.device("meta"):  # the parts are loaded by themselves
        vlm = model_class(model_class.config_class(**keys))
    dtype = getattr(torch, config.dtype)
    projector_class = type(vlm.model.multi_modal_projector)
    vlm.model.multi_modal_projector = projector_class(vlm.config).to(dtype)
    if config.architecture == "llava_next":
        width = vlm.config.text_config.hidden_size
        vlm.model.image_newline = nn.Parameter((torch.randn(width) / math.sqrt(width)).to(dtype))
    return vlm
