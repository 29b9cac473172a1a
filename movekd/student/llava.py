"""Make a LLaVA with a new projector, for a vision tower and a language model to be put into.

Used by ``vlm.build_vlm``. The classes are transformers' own where these compute the student;
another projector, or registers before the patches, need those of ``export.modeling_movekd``.
"""

import math
from typing import Any, get_args

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from movekd.errors import WeightsError, shorten
from movekd.student.config import ProjectorType, StudentConfig
from movekd.student.export.modeling_movekd import (
    MovekdLlavaForConditionalGeneration,
    MovekdLlavaNextForConditionalGeneration,
)
from movekd.student.llava_next import GRID_PINPOINTS
from movekd.student.projector import prompt_grid
from movekd.student.towers import TOWERS, num_prefix_tokens

LLAVA_CLASSES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaForConditionalGeneration, MovekdLlavaForConditionalGeneration),
    "llava_next": (LlavaNextForConditionalGeneration, MovekdLlavaNextForConditionalGeneration),
}
"""``model_type`` of a config.json -> the class of transformers, and ours where that is wrong."""


def llava_class(model_type: str, projector_type: str, vision_config: Any) -> Any:
    """Return the class of a LLaVA by keys of its config.

    Raises:
        WeightsError: the keys are those of another model.
    """
    if model_type not in LLAVA_CLASSES or projector_type not in get_args(ProjectorType):
        raise WeightsError(
            f"the model is a '{shorten(model_type)}' with projector_type "
            f"'{shorten(projector_type)}'; expected {' or '.join(LLAVA_CLASSES)}, and "
            f"{' or '.join(get_args(ProjectorType))}. Export the model again."
        )
    stock, own = LLAVA_CLASSES[model_type]
    is_known = vision_config.model_type in TOWERS  # another one is refused when it is loaded
    has_registers = is_known and num_prefix_tokens(vision_config) > 1
    is_stock = projector_type == "mlp2x_gelu" and not has_registers
    return stock if is_stock else own


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
    if config.attn_implementation is not None:
        keys["attn_implementation"] = config.attn_implementation  # LlavaConfig tells its parts
    if config.architecture == "llava_next":
        keys["image_grid_pinpoints"] = GRID_PINPOINTS
    model_class = llava_class(config.architecture, config.projector_type, vision_config)
    with torch.device("meta"):  # the parts are loaded by themselves
        vlm = model_class(model_class.config_class(**keys))
    dtype = getattr(torch, config.dtype)
    projector_class = type(vlm.model.multi_modal_projector)
    vlm.model.multi_modal_projector = projector_class(vlm.config).to(dtype)
    if config.architecture == "llava_next":
        width = vlm.config.text_config.hidden_size
        vlm.model.image_newline = nn.Parameter((torch.randn(width) / math.sqrt(width)).to(dtype))
    return vlm
