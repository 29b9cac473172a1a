"""List the vision towers that can be a student: one entry per model type of transformers.

A new tower is one entry here, if its blocks have an MLP of ``fc1``, an activation and ``fc2`` and
its output has hidden states.
"""

from dataclasses import dataclass
from typing import Any

import torch

from movekd.errors import ConfigError


@dataclass(frozen=True)
class TowerType:
    """Where a tower keeps what the student and its exports need.

    Attributes:
        title: the architecture's name, for the model card.
        num_special: tokens before the patches besides registers (``num_register_tokens``): 1 for
            [CLS], 0 without.
        blocks: path of the list of blocks.
        mlp: name of the MLP in a block.
        first_norm: name of a norm between the embeddings and the first block.
        takes_mask: a block's ``attention_mask`` has no default.
    """

    title: str
    num_special: int
    blocks: str = "encoder.layers"
    mlp: str = "mlp"
    first_norm: str | None = None
    takes_mask: bool = False


TOWERS: dict[str, TowerType] = {
    "clip_vision_model": TowerType(
        "CLIP", num_special=1, first_norm="pre_layrnorm", takes_mask=True
    ),
    "siglip_vision_model": TowerType("SigLIP", num_special=0, takes_mask=True),
    "dinov2": TowerType("DINOv2", num_special=1, blocks="encoder.layer"),
    "dinov2_with_registers": TowerType(
        "DINOv2 with registers", num_special=1, blocks="encoder.layer"
    ),
}

EXPORTED_TYPES = {
    "clip_vision_model": "movekd_clip_vision",
    "siglip_vision_model": "movekd_siglip_vision",
    "dinov2": "movekd_dinov2",
    "dinov2_with_registers": "movekd_dinov2_with_registers",
}
"""Type of a tower -> its type in an export with experts (``export.modeling_movekd``)."""

TOWERS |= {exported: TOWERS[stock] for stock, exported in EXPORTED_TYPES.items()}


def register_tower(model_type: str, tower: TowerType) -> None:
    """Add a vision tower, by the ``model_type`` of its config."""
    TOWERS[model_type] = tower


def tower_type(tower_config: Any) -> TowerType:
    """Return the entry of a tower.

    Raises:
        ConfigError: the tower is of an unknown type.
    """
    kind = tower_config.model_type
    if kind not in TOWERS:
        raise ConfigError(
            f"student.vision_tower is a '{kind}'; expected one of {', '.join(TOWERS)}, "
            "whose tokens and MLPs are known. Give the directory or hub id of one of these."
        )
    return TOWERS[kind]


def num_prefix_tokens(tower_config: Any) -> int:
    """Return how many tokens stand before the patches: [CLS] and registers, or none.

    Raises:
        ConfigError: the tower is of an unknown type.
    """
    registers = int(getattr(tower_config, "num_register_tokens", 0))
    return tower_type(tower_config).num_special + registers


def check_tower(tower: Any) -> None:
    """Hold a loaded tower against its entry.

    Raises:
        ConfigError: the tower is of an unknown type, or its entry does not fit it.
    """
    kind, config = tower_type(tower.config), tower.config
    names = {name for name, _ in tower.named_modules()}
    for path in (kind.blocks, f"{kind.blocks}.0.{kind.mlp}", kind.first_norm or "embeddings"):
        if path not in names:
            raise ConfigError(
                f"the tower type '{config.model_type}' says that the tower has '{path}', and "
                f"{type(tower).__name__} has no such module. Correct its entry (student/towers.py)."
            )
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, dtype=tower.dtype)
    with torch.no_grad():
        found = tower.embeddings(pixels).shape[1]
    patches = (config.image_size // config.patch_size) ** 2
    if found != patches + num_prefix_tokens(config):
        raise ConfigError(
            f"the tower type '{config.model_type}' says that {num_prefix_tokens(config)} tokens "
            f"stand before the patches; expected {found - patches}, since {type(tower).__name__} "
            f"makes {found} tokens of {patches} patches. Correct num_special of its entry "
            "(student/towers.py)."
        )
