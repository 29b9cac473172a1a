"""The trainings of the pilot: the tower or its experts, teachers, forms of the loss, a control."""

from dataclasses import dataclass
from typing import Literal

TEACHERS = ("vit_s", "efficientnet_lite0", "hed")
TWO = TEACHERS[:2]
"""Without the finder of edges."""


def full(rate: str) -> tuple[str, ...]:
    """Return the keys that train the whole tower at a learning rate, without experts."""
    return ("student.mole=null", f"learning_rates.vision_tower={rate}")


def experts(rate: str) -> tuple[str, ...]:
    """Return the keys that train the experts at a learning rate."""
    return (f"learning_rates.mole={rate}",)


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        name: of its row.
        keys: ``--set`` values, on top of distill.yaml.
        teachers: specs in ``teachers/``; the first one is the anchor.
        steps: optimizer steps.
        cache: ``shuffled``: every image has the targets of another one.
        is_final: whether the test images are read with it.
    """

    name: str
    keys: tuple[str, ...] = ()
    teachers: tuple[str, ...] = TWO
    steps: int = 250
    cache: Literal["cache", "shuffled"] = "cache"
    is_final: bool = False


FULL = full("1e-4")
EXPERTS_BASE = (
    *experts("1e-3"),
    "student.mole.lora_alpha=128",  # a scale of 4
    "trained=[mole, vision_tower]",
    "learning_rates.vision_tower=1e-4",
)
"""The experts and the tower's own weights learn together."""
ARMS: tuple[Arm, ...] = (
    Arm("full", FULL, is_final=True),
    Arm("experts", experts("2e-3"), is_final=True),
    Arm("full_shuffled", FULL, cache="shuffled", is_final=True),
    Arm("full_hed", FULL, TEACHERS, is_final=True),
    Arm("full_mse", (*FULL, "distill.loss=mse", "distill.target_clip=0"), is_final=True),
    Arm(
        "full_cnn_8",
        (*FULL, "distill.teacher_weighting=anchor_equal", "distill.anchor_share=0.2"),
    ),
    Arm("experts_base", EXPERTS_BASE, is_final=True),
)
