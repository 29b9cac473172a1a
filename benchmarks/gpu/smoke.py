"""Sizes with which `gpu.check --smoke` runs every part on a CPU, in a minute. They measure nothing.

The benchmarks name full-size models in constants of their modules; ``shrink`` replaces these.
"""

from typing import Any

from transformers import CLIPVisionConfig

import cached_vs_live
import mole
import training_setup
from gpu import parts
from gpu.parts import Scale
from movekd.cache.spec import CacheSpec, load_spec
from training_setup import Size

SMOKE = Scale(
    teachers={"clip": 6, "eva02": 6, "sam": 6, "convnext": 6},
    build_pairs=1,
    batch_size="4",
    training=Size(("clip", "sam"), 128, 128, 4, 2, 1, 1, ("int8",)),
    mole_images=1,
    mole_pairs=2,
    compiles=False,
    tokens=(8, 16, 256),
)
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "clip": {"image_size": 56, "model_args": {"model_type": "clip_vision_model"} | _TOWER},
    "eva02": {
        "image_size": 64,
        "model_args": {
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 4,
            "global_blocks": [2],
            "base_grid": 4,
            "pretrain_grid": 3,
        },
    },
    "convnext": {
        "image_size": 64,
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]},
    },
    "sam": {
        "image_size": 64,
        "model_args": {
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "global_attn_indexes": [1],
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "output_channels": 16,
        },
    },
}


def small_spec(name: str) -> CacheSpec:
    """Return a shipped spec whose model is small."""
    return load_spec(name).with_changes(**_CHANGES[name])


def shrink() -> None:
    """Make all parts of this process small."""
    tower = CLIPVisionConfig(**_TOWER, attn_implementation="eager")
    changes: list[tuple[Any, str, Any]] = [
        (mole, "VIT_L", tower),
        (mole, "NUM_TOKENS", 17),
        (training_setup, "VIT_L", tower),
        (training_setup, "GRID", 4),
        (cached_vs_live, "GRID", 4),
        (training_setup, "load_spec", small_spec),
        (parts, "load_spec", small_spec),
    ]
    for module, name, value in changes:
        setattr(module, name, value)
