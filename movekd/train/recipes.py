"""What `recipe` sets: defaults of the keys in which the released code and this project differ.

A recipe of this project may change with a new version of movekd. A run that is resumed keeps the
values that it began with (``keep_values``): a model half trained by each would be neither.
"""

import copy
from typing import Any

from movekd.distill.config import NEWER_KEYS
from movekd.student.config import Recipe

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
            "lora_alpha": None,  # r, so that the scale is 1
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

PLACES = {"mole": ("student", "mole"), "distill": ("distill",)}
"""Section of ``RECIPES`` -> path of its keys in student.yaml."""


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
        for key, default in defaults.items():
            if ours.get(key) is not None or theirs.get(key) is None:
                continue
            ours[key] = theirs[key]
            today = theirs.get("r") if key == "lora_alpha" and default is None else default
            if today != theirs[key]:
                name = ".".join((*PLACES[part], key))
                lines.append(
                    f"{name} is {theirs[key]} in this run; recipe {recipe} sets {today} today."
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
