"""Keys of the objective: `distill:` and `loss_terms:` of student.yaml."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator

from movekd.config import FrozenModel, ModelT, Number, Text
from movekd.distill.token_loss import LossForm
from movekd.distill.weighting import TeacherWeighting, TokenWeighting
from movekd.errors import ConfigError, did_you_mean

WITH_ANCHOR_SHARE: tuple[TeacherWeighting, ...] = ("anchor", "anchor_equal")
"""Teacher weightings that give the anchor a fixed share."""


class DistillConfig(FrozenModel):
    """What the student learns from the teachers. Null keys take the recipe's value."""

    teachers: list[Text] = Field(
        min_length=1, max_length=64, description="Groups of the cache, by name."
    )
    anchor: Text = Field(
        default="clip", description="The teacher whose [CLS] gives token and teacher weights."
    )
    kd_weight: Number | None = Field(
        default=None, ge=0, le=1e4, description="Weight of the KD loss. official: 0.5; revised: 2."
    )
    adapters: Literal["teacher", "student"] | None = Field(
        default=None,
        description="teacher: compare adapted teacher tokens with the student's (official). "
        "student: one head per teacher predicts its tokens (revised).",
    )
    targets: Literal["raw", "standardised", "scaled"] | None = Field(
        default=None,
        description="raw: features as cached (official). standardised: by the cache's channel "
        "statistics (revised). scaled: less the channel means, divided by one number per teacher.",
    )
    loss: LossForm | None = Field(
        default=None,
        description="Form of the loss per token. mse: squared error. smooth_l1: linear for large "
        "errors. cosine+smooth_l1: 0.9 and 0.1 of the two, as in Theia.",
    )
    target_clip: Number | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Limit of standardised targets, in standard deviations; 0: none. With 8, rare "
        "outliers of real features do not dominate the loss.",
    )
    summary_weight: Number = Field(
        default=0.0,
        ge=0,
        le=1e4,
        description="Weight of the global loss: one more head per teacher predicts its [CLS] (the "
        "mean of its tokens, if the cache has none) from the student's [CLS], by cosine. 0: none.",
    )
    grid: Literal["native", "student"] | None = Field(
        default=None,
        description="native: the cache's own grid; the adapter mixes its tokens (official). "
        "student: area-averaged to the student's grid (revised).",
    )
    token_weighting: TokenWeighting | None = Field(
        default=None, description="softmax (official), blend (revised) or none."
    )
    token_blend: Number = Field(
        default=0.5, ge=0, le=1, description="Share of attention in `blend`."
    )
    teacher_weighting: TeacherWeighting | None = Field(
        default=None,
        description="anchor (official), anchor_equal, equal (revised), similarity to the anchor, "
        "or balanced by the losses.",
    )
    anchor_share: Number | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Weight of the anchor in `anchor` and `anchor_equal`; the other teachers share "
        "the rest. Null: 0.8, as released (`--kd_memory_w`).",
    )
    sam_layout: Literal["plain", "released"] = Field(
        default="plain",
        description="Order of the tokens that the adapter of teacher 'sam' gets. released: the "
        "released code's order, which the adapters of its checkpoints expect; only with "
        "adapters: teacher and grid: native.",
    )
    views: Literal["base", "all"] = Field(
        default="base",
        description="base: distil only the whole image. all: distil its tiles as well (llava_next, "
        "or stage distill); needs a cache with tiles.",
    )

    @field_validator("teachers")
    @classmethod
    def _no_teacher_twice(cls, teachers: list[str]) -> list[str]:
        if len(set(teachers)) < len(teachers):
            raise ValueError("a teacher is named twice")
        return teachers


class LossTermConfig(FrozenModel):
    """Keys of one entry of `loss_terms`; a term with more keys subclasses this."""

    weight: Number = Field(ge=-1e4, le=1e4, description="Weight of the term in the loss.")


def check_distill(distill: DistillConfig, loss_terms: Iterable[str] = ()) -> None:
    """Refuse keys that contradict each other; every null key must be filled in.

    Args:
        distill: the keys.
        loss_terms: names of the run's extra loss terms.

    Raises:
        ConfigError: names the keys.
    """
    if distill.anchor not in distill.teachers and (
        distill.token_weighting != "none" or distill.teacher_weighting not in ("equal", "balanced")
    ):
        raise ConfigError(
            f"distill.anchor '{distill.anchor}' is not among distill.teachers "
            f"({', '.join(distill.teachers)}).{did_you_mean(distill.anchor, distill.teachers)} "
            "Add it, or set token_weighting: none and teacher_weighting: equal (or balanced)."
        )
    if distill.anchor_share is not None and distill.teacher_weighting not in WITH_ANCHOR_SHARE:
        raise ConfigError(
            f"distill.anchor_share is {distill.anchor_share}, but teacher_weighting: "
            f"{distill.teacher_weighting} gives the anchor no fixed share. Leave it out, or "
            "set teacher_weighting: anchor (or anchor_equal)."
        )
    taken = [n for n in loss_terms if n == "summary" or n.startswith("summary_")]
    if distill.summary_weight and taken:
        raise ConfigError(
            f"loss_terms names '{taken[0]}', and distill.summary_weight logs its own losses under "
            "summary and summary_... Register the term under another name, or set summary_weight: "
            "0."
        )
    if distill.target_clip and distill.targets != "standardised":
        raise ConfigError(
            f"distill.target_clip is {distill.target_clip:g} standard deviations, and targets: "
            f"{distill.targets} are not measured in those. Set targets: standardised, or "
            "target_clip: 0."
        )
    if distill.teacher_weighting == "similarity" and distill.grid == "native":
        raise ConfigError(
            "distill.teacher_weighting: similarity compares teachers token by token and needs "
            "distill.grid: student."
        )
    if distill.teacher_weighting == "anchor" and distill.adapters == "student":
        raise ConfigError(
            "distill.teacher_weighting: anchor compares the anchor's [CLS] with tokens adapted to "
            "its width, and adapters: student adapts none. Set teacher_weighting: anchor_equal, "
            "or adapters: teacher."
        )
    if distill.sam_layout == "released" and (
        distill.adapters != "teacher" or distill.grid != "native" or "sam" not in distill.teachers
    ):
        raise ConfigError(
            "distill.sam_layout: released is for adapters: teacher, grid: native and a teacher "
            "'sam', as in recipe official with sam; set it to plain, or set those."
        )
    if distill.adapters == "student" and distill.grid == "native":
        raise ConfigError(
            "distill.adapters: student predicts token by token and needs distill.grid: student; "
            "only adapters: teacher can mix a native grid."
        )


NEWER_KEYS: dict[str, Any] = {"loss": "mse", "target_clip": 0.0, "summary_weight": 0.0}
"""Keys of `distill` that config.yaml of older runs lacks -> what such a run did."""


def fill_distill(distill: DistillConfig, defaults: dict[str, Any]) -> DistillConfig:
    """Return `distill` with the recipe's values; a limit only where targets are standardised."""
    distill = fill(distill, {k: v for k, v in defaults.items() if k != "target_clip"})
    clip = defaults["target_clip"] if distill.targets == "standardised" else 0.0
    return fill(distill, {"target_clip": clip})


def fill(keys: ModelT, defaults: dict[str, Any]) -> ModelT:
    """Return the config ``keys`` with every null taken from ``defaults``."""
    missing = {key: value for key, value in defaults.items() if getattr(keys, key) is None}
    return keys.model_copy(update=missing)
