"""List the vision towers that can be a student: one entry per model type of transformers.

A new tower is one entry here, if its blocks have an MLP of two linear layers and an activation, and
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
        positions: name of the learned table of positions in the state dict of ``embeddings``, which
            has ``interpolate_pos_encoding``; None without a table.
        rotary: name of the module that makes the blocks' ``position_embeddings`` from the pixels.
        gated_by: key of the config that makes the MLPs gated ones, into which no experts fit.
        stored_blocks: path of the blocks in transformers' files, if it is not ``blocks``.
    """

    title: str
    num_special: int
    blocks: str = "encoder.layers"
    mlp: str = "mlp"
    first_norm: str | None = None
    takes_mask: bool = False
    positions: str | None = None
    rotary: str | None = None
    gated_by: str | None = None
    stored_blocks: str | None = None


TOWERS: dict[str, TowerType] = {
    "clip_vision_model": TowerType(
        "CLIP",
        num_special=1,
        first_norm="pre_layrnorm",
        takes_mask=True,
        positions="position_embedding.weight",
    ),
    "siglip_vision_model": TowerType(
        "SigLIP", num_special=0, takes_mask=True, positions="position_embedding.weight"
    ),
    "dinov2": TowerType(
        "DINOv2",
        num_special=1,
        blocks="encoder.layer",
        positions="position_embeddings",
        gated_by="use_swiglu_ffn",
    ),
    "dinov2_with_registers": TowerType(
        "DINOv2 with registers",
        num_special=1,
        blocks="encoder.layer",
        positions="position_embeddings",
        gated_by="use_swiglu_ffn",
    ),
    "dinov3_vit": TowerType(
        "DINOv3",
        num_special=1,
        blocks="model.layer",
        rotary="rope_embeddings",
        gated_by="use_gated_mlp",
        stored_blocks="layer",
    ),
}

REFUSED = {
    "siglip2_vision_model": "it cuts an image of any shape into up to num_patches patches (NaFlex),"
    " and a student sees the square that its teachers saw. Take a SigLIP 2 of fixed resolution, "
    "whose config.json says siglip_vision_model, such as google/siglip2-base-patch16-384.",
    "dinov3_convnext": "its stages halve the grid again and again, so its hidden states are no "
    "patch tokens of one grid, and no [CLS] stands before them. Take a ViT of DINOv3, such as "
    "facebook/dinov3-vitb16-pretrain-lvd1689m.",
}
"""Type of a tower of transformers -> why it cannot be a student, and what can."""

EXPORTED_TYPES = {
    "clip_vision_model": "movekd_clip_vision",
    "siglip_vision_model": "movekd_siglip_vision",
    "dinov2": "movekd_dinov2",
    "dinov2_with_registers": "movekd_dinov2_with_registers",
    "dinov3_vit": "movekd_dinov3_vit",
}
"""Type of a tower -> its type in an export with experts (``export.modeling_movekd``)."""

TOWERS |= {exported: TOWERS[stock] for stock, exported in EXPORTED_TYPES.items()}


def register_tower(model_type: str, tower: TowerType) -> None:
    """Add a vision tower, by the ``model_type`` of its config."""
    TOWERS[model_type] = tower


def tower_type(tower_config: Any) -> TowerType:
    """Return the entry of a tower.

    Raises:
        ConfigError: the tower is of an unknown type, or of one that cannot be a student.
    """
    kind = tower_config.model_type
    if kind in REFUSED and kind not in TOWERS:
        raise ConfigError(f"student.vision_tower is a '{kind}': {REFUSED[kind]}")
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
    parts = ("embeddings", kind.blocks, f"{kind.blocks}.0.{kind.mlp}", kind.first_norm, kind.rotary)
    for path in parts:
        if path is not None and path not in names:
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
