"""Say what a student was made of: its base models and the run that trained it.

Input: the resolved config of a run. Used by model cards, ``movekd.json`` and official exports.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMPORTED_KEY = "movekd_imported"
"""Key in the config.json of a base model that `movekd import` wrote: what it was imported from. Its
weights are those of a finetune, so experts that were trained on it are useless without it."""


def imported_from(vlm: Any) -> dict[str, Any] | None:
    """Return what the base models were imported from, or None."""
    for key in ("text_config", "vision_config"):
        mark = getattr(getattr(vlm.config, key, None), IMPORTED_KEY, None)
        if isinstance(mark, dict):
            return mark
    return None


def base_models(run: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run started from: vision tower and language model."""
    imported = run.get("imported") or {}
    student = run.get("student") or {}
    keys = ("vision_tower", "language_model")
    found = {key: str(imported.get(key) or student.get(key) or "") for key in keys}
    return {key: value for key, value in found.items() if value and not value.startswith("base/")}


def made_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a run's config that exports keep; no path of this machine."""
    bases = {
        key: base if is_hub_id(base) else f"./{Path(base).name}"
        for key, base in base_models(run).items()
    }
    kept = {key: run[key] for key in ("recipe", "stage", "imported") if key in run}
    teachers = (run.get("distill") or {}).get("teachers")
    if "imported" in kept:
        kept["imported"] = {"from": kept["imported"].get("from")} | bases
    return kept | {"student": bases, "distill": {"teachers": teachers} if teachers else None}


def public_name(base: str) -> str:
    """Return a base model's hub id, or the name of its folder: no path of this machine."""
    return base if is_hub_id(base) else Path(base).name


def is_hub_id(name: str) -> bool:
    """Return whether a base model is named by its hub id."""
    is_local = name.startswith(("/", ".", "~")) or os.path.exists(name)
    return name.count("/") == 1 and not is_local
