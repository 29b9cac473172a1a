"""List the vision towers that can be a student: one entry per model type of transformers.

A new tower is one entry here, if its blocks have an MLP of ``fc1``, an activation and ``fc2`` and
its output has hidden states.
"""

from dataclasses import dataclass
from typing import Any

from movekd.errors import ConfigError


@dataclass(frozen=True)
class TowerType:
    """Where a tower keeps what the student and its exports need.

    Attributes:
        title: the architecture's name, for the model card.
        has_cls: a [CLS] token stands first. Registers (``num_register_tokens``) follow it.
        blocks: path of the list of blocks.
        mlp: name of the MLP in a block.
        first_norm: name of a norm between the embeddings and the first block.
        takes_mask: a block's ``attention_mask`` has no default.
    """

    title: str
    has_cls: bool
    blocks: str = "encoder.layers"
    mlp: str = "mlp"
    first_norm: str | None = None
    takes_mask: bool = False


_CLIP = TowerType("CLIP", has_cls=True, first_norm="pre_layrnorm", takes_mask=True)

TOWERS: dict[str, TowerType] = {
    "clip_vision_model": _CLIP,
    "movekd_clip_vision": _CLIP,  # an exported CLIP with experts
    "siglip_vision_model": TowerType("SigLIP", has_cls=False, takes_mask=True),
    "dinov2": TowerType("DINOv2", has_cls=True, blocks="encoder.layer"),
    "dinov2_with_registers": TowerType(
        "DINOv2 with registers", has_cls=True, blocks="encoder.layer"
    ),
}


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
    return int(tower_type(tower_config).has_cls) + registers
