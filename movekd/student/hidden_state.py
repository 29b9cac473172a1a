"""Run the vision tower once, and take from its output the patches and the global token.

Input: a student's model and pixels. Output: the hidden state that the student reads, with what
stands before the patches. Used by ``vlm.image_features`` and by training.

Legend: B views, T tokens of the tower (prefix and patches), N patch tokens, D channels.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from movekd.student.towers import num_prefix_tokens, tower_type


def image_hidden_state(
    vlm: Any, pixels_BCHW: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
) -> tuple[Any, Tensor]:
    """Return transformers' image output, and the hidden state (B, T, D) that the student reads.

    The arguments are those of ``vlm.image_features``; the output is None for an encoder.
    """
    if hasattr(vlm, "hidden_state"):  # a ``VisionEncoderOnly``
        return None, vlm.hidden_state(pixels_BCHW)
    layer = vlm.config.vision_feature_layer
    sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
    output = vlm.model.get_image_features(
        pixel_values=pixels_BCHW,
        **sizes,
        vision_feature_layer=layer,
        vision_feature_select_strategy=vlm.config.vision_feature_select_strategy,
        return_dict=True,
    )
    return output, output.hidden_states[layer]


def tower_hidden_state(vlm: Any, pixels_BCHW: Tensor) -> Tensor:
    """Return the hidden state (B, T, D) that the student reads, without projecting it."""
    output = vlm.model.vision_tower(pixels_BCHW, output_hidden_states=True)
    hidden_BTD: Tensor = output.hidden_states[vlm.config.vision_feature_layer]
    return hidden_BTD


def patch_tokens(hidden_BTD: Tensor, vision_config: Any) -> Tensor:
    """Return the patch tokens (B, N, D) of a hidden state."""
    return hidden_BTD[:, num_prefix_tokens(vision_config) :]


def global_token(hidden_BTD: Tensor, vision_config: Any) -> Tensor:
    """Return the [CLS] token (B, D) of a hidden state; of a tower without one, the mean patch."""
    if tower_type(vision_config).num_special:
        return hidden_BTD[:, 0]
    return patch_tokens(hidden_BTD, vision_config).mean(dim=1)
