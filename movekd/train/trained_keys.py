"""Which parts learn where `trained` is null, and at which rate: by stage and recipe.

Input: the stage, the recipe and the keys that student.yaml gives. Output: `trained` and
`learning_rates`, filled in. Used by ``config``, and by ``recipes`` for a run that is resumed.
"""

from typing import Literal

from movekd.distill.config import fill
from movekd.student.config import Recipe
from movekd.train.training_keys import LearningRates

Stage = Literal["distill", "pretrain", "finetune"]
Part = Literal["mole", "projector", "vision_tower", "language_model"]

TRAINED: dict[Stage, tuple[Part, ...]] = {
    "distill": ("mole",),
    "pretrain": ("mole", "projector"),
    "finetune": ("mole", "projector", "vision_tower", "language_model"),
}
"""Default of `trained`: the parts that learn in each stage. Adapters and heads always learn."""

ENCODER_PARTS: tuple[Part, ...] = ("mole", "vision_tower")
"""The parts of a student without a language model."""

TOWER_RATE: dict[Recipe, float] = {"revised": 1.0e-4}
"""Recipes in which the tower's own weights learn beside experts in `pretrain` -> their rate there.

Not that of projector and experts, 1e-3: a pretrained ViT-S was harmed at 3e-4 (docs/photos.md).
"""


def fill_trained(
    stage: Stage,
    recipe: Recipe,
    trained: list[Part] | None,
    rates: LearningRates | None,
    *,
    has_experts: bool,
) -> tuple[list[Part], LearningRates | None]:
    """Return the parts that learn and the rates of parts, with the defaults filled in.

    A rate of the recipe belongs to its choice of parts: a config that names `trained` gets none.
    """
    if trained is not None:
        return trained, rates
    parts = [part for part in TRAINED[stage] if part != "mole" or has_experts]
    rate = TOWER_RATE.get(recipe)
    if rate is not None and stage == "pretrain" and has_experts:
        parts.append("vision_tower")
        rates = fill(rates or LearningRates(), {"vision_tower": rate})
    return parts or ["vision_tower"], rates
