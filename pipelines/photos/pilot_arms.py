"""The trainings of the pilot: short tries, and the arms that are compared on test images."""

from dataclasses import dataclass
from typing import Literal

SUMMARY = "distill.summary_weight=1"


def full(rate: str) -> tuple[str, ...]:
    """Return the keys that train the whole tower at a learning rate, without experts."""
    return ("student.mole=null", f"learning_rates.vision_tower={rate}", SUMMARY)


def experts(rate: str) -> tuple[str, ...]:
    """Return the keys that train the experts at a learning rate."""
    return (f"learning_rates.mole={rate}", SUMMARY)


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        name: of its row.
        keys: ``--set`` values, on top of distill.yaml.
        steps: optimizer steps.
        cache: ``shuffled``: every image has the targets of another one.
    """

    name: str
    keys: tuple[str, ...] = ()
    steps: int = 200
    cache: Literal["cache", "shuffled"] = "cache"


FULL = full("3e-4")
ARMS: tuple[Arm, ...] = (
    Arm("full", FULL),
    Arm("experts", experts("2e-3")),
    Arm("experts_shuffled", experts("2e-3"), cache="shuffled"),
    Arm("full_mse", (*FULL, "distill.loss=mse", "distill.target_clip=0")),
)
TRIES: tuple[Arm, ...] = (
    Arm("try_full_5e-5", full("5e-5"), steps=60),
    Arm("try_full_1e-4_tokens", (*full("1e-4")[:2],)),
    Arm("try_experts_1e-3_tokens", (*experts("1e-3")[:1],)),
)
