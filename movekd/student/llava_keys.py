"""Check the keys of a loaded LLaVA that its weights say nothing about.

Input: a model that ``checkpoint.load_export`` loaded, and its tokenizer. Output: nothing, or
an error that names the key.
"""

from pathlib import Path
from typing import Any

from movekd.errors import WeightsError, shorten
from movekd.student.tokenizer import IMAGE_TOKEN
from movekd.student.towers import num_prefix_tokens


def check_llava(vlm: Any, tokenizer: Any, source: Path) -> None:
    """Check the keys of a loaded LLaVA that no weight depends on.

    Raises:
        WeightsError: a key has a value with which no question could be answered.
    """
    config, tower = vlm.config, vlm.config.vision_config
    rows = vlm.get_input_embeddings().num_embeddings
    num_prefix = num_prefix_tokens(tower)
    num_layers = tower.num_hidden_layers
    layer = config.vision_feature_layer
    strategy = "default" if num_prefix == 1 else "full"
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    is_layer = isinstance(layer, int) and -num_layers <= layer < 0
    for key, found, expected, is_right in (
        ("vision_feature_layer", layer, f"-1 to -{num_layers}", is_layer),
        ("image_token_index", config.image_token_id, image_id, config.image_token_id == image_id),
        (
            "vision_feature_select_strategy",
            config.vision_feature_select_strategy,
            strategy,
            config.vision_feature_select_strategy == strategy,
        ),
        ("a vocabulary of", rows, f"at least {len(tokenizer)}", rows >= len(tokenizer)),
    ):
        if not is_right:
            raise WeightsError(
                f"{source} has {key} {shorten(repr(found), 80)}; expected {expected}. Export the "
                "model again."
            )
