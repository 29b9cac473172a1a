"""What `recipe` sets: defaults of the keys in which the released code and this project differ.

A recipe of this project may change with a new version of movekd. A run that is resumed keeps the
values that it began with (``keep_values``): a model half trained by each would be neither.
"""

import copy
from typing import Any

from movekd.distill.config import NEWER_KEYS
from movekd.student.config import Recipe
from movekd.train.trained_keys import fill_trained

RECIPES: dict[Recipe, dict[str, dict[str, Any]]] = {
    "official": {
        "mole": {
            "lora_alpha": 1.0,
            "use_gate": False,
            "init_lora_weights": "kaiming",
            "layers_to_transform": "all",
            "balance": "sample",
        },
        "distill": {
            "kd_weight": 0.5,
            "adapters": "teacher",
            "targets": "raw",
            "loss": "mse",
            "target_clip": 0.0,  # none
            "grid": "native",
            "token_weighting": "softmax",
            "teacher_weighting": "anchor",
        },
    },
    "revised": {
        "mole": {
            "use_gate": True,
            "init_lora_weights": "zero",
            "layers_to_transform": "read",
            "balance": "batch",
        },
        "distill": {
            "kd_weight": 2.0,
            "adapters": "student",
            "targets": "standardised",
            "loss": "mse",
            "target_clip": 0.0,  # none
            "grid": "student",
            "token_weighting": "blend",
            "teacher_weighting": "equal",
        },
    },
}
RECIPES["revised_2026_11"] = copy.deepcopy(RECIPES["revised"])
"""Defaults that `recipe` sets; a key in student.yaml overrides its default.

A recipe with a month is `revised` as it was then, for runs that are to be repeated.
"""

LORA_SCALE: dict[Recipe, int] = {"revised": 4, "revised_2026_11": 1}
"""lora_alpha / r, of recipes that set lora_alpha by the rank."""

_TOWER = "vision_tower"

PLACES = {"mole": ("student", "mole"), "distill": ("distill",)}
"""Section of ``RECIPES`` -> path of its keys in student.yaml."""


def mole_defaults(recipe: Recipe, r: int) -> dict[str, Any]:
    """Return what a recipe sets of `student.mole`, for experts of rank ``r``."""
    defaults = RECIPES[recipe]["mole"]
    if recipe in LORA_SCALE:
        return {"lora_alpha": float(LORA_SCALE[recipe] * r)} | defaults
    return defaults


def keep_values(content: dict[str, Any], begun: dict[str, Any]) -> list[str]:
    """Put the values that a recipe gave a run into the config of its resume.

    Only where the config leaves the choice to the recipe, and names the run's.

    Args:
        content: what student.yaml and the overrides say; changed in place.
        begun: the run's own config.yaml, resolved.

    Returns:
        Keys whose default is another one today, a line each: the run's value, and today's.
    """
    recipe = content.get("recipe")
    if recipe not in RECIPES or begun.get("recipe") != recipe:
        return []
    lines = []
    for part, defaults in RECIPES[recipe].items():
        theirs = _section(begun, PLACES[part])
        if theirs is None or (ours := _section(content, PLACES[part])) is None:
            continue
        if part == "distill":
            theirs = NEWER_KEYS | theirs
        elif isinstance(rank := theirs.get("r"), int):
            defaults = mole_defaults(recipe, rank)
        for key, default in defaults.items():
            if ours.get(key) is not None or theirs.get(key) is None:
                continue
            ours[key] = theirs[key]
            if default != theirs[key]:
                name = ".".join((*PLACES[part], key))
                lines.append(
                    f"{name} is {theirs[key]} in this run; recipe {recipe} sets {default} today."
                )
    return lines + _keep_trained(content, begun)


def _keep_trained(content: dict[str, Any], begun: dict[str, Any]) -> list[str]:
    """Keep which parts learn, and the tower's rate, where the config leaves both to the recipe."""
    theirs, recipe = begun.get("trained"), content["recipe"]
    if content.get("trained") is not None or not isinstance(theirs, list):
        return []
    has_experts = content["student"].get("mole", {}) is not None
    parts, rates = fill_trained(content["stage"], recipe, None, None, has_experts=has_experts)
    content["trained"] = theirs
    lines = []
    if sorted(theirs) != sorted(parts):
        lines.append(f"trained is {theirs} in this run; recipe {recipe} sets {parts} today.")
    begun_rate = (begun.get("learning_rates") or {}).get(_TOWER)
    ours = content.get("learning_rates") or {}
    if begun_rate is None or _TOWER not in theirs or ours.get(_TOWER) is not None:
        return lines
    content["learning_rates"] = ours | {_TOWER: begun_rate}
    today = None if rates is None else rates.vision_tower
    if today not in (None, begun_rate):
        lines.append(
            f"learning_rates.{_TOWER} is {begun_rate} in this run; recipe {recipe} sets {today} "
            "today."
        )
    return lines


def _section(content: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """Return a section of a config that a recipe fills; None if the run has none.

    Without a word about experts a run has them (a new section), without `distill` no distillation.
    """
    found: Any = content
    for part in path:
        if part == "mole":
            found.setdefault(part, {})
        found = found.get(part)
        if not isinstance(found, dict):
            return None
    section: dict[str, Any] = found
    return section
