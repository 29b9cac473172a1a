"""The plan of the study with twelve worlds, fixed before its first run.

docs/twelve-worlds.md explains it. Worlds are the units. Six main arms run in all worlds, single
parts and controls in eight of them. Every revised arm names the recipe of its month, so that no
later default changes what it was.
"""

from dataclasses import replace
from typing import Any

from study.plan import FULL, NONE, REVISED, Arm, Contrast

WORLDS = tuple(range(3, 15))
SEEDS = (0, 1)
PART_WORLDS = tuple(range(3, 11))
"""Worlds of single parts and controls."""
PART_SEEDS = (0,)

SCALE_4 = "student.mole.lora_alpha=64"  # at a rank of 16
EXPERTS = (REVISED, SCALE_4)
BASE_IN_STAGE_1 = ("trained=[vision_tower, mole, projector]",)
OFFICIAL = ("recipe=official",)
RELEASED_RATE = ("training.learning_rate=2.0e-5",)
TUNED = ("distill.kd_weight=0.5", "distill.anchor_share=0.25")
TUNED_RATE = ("training.learning_rate=1.0e-3",)
"""Keys of both stages, and of stage 2, that ``tune`` chose for the official recipe."""

MAIN: dict[str, Any] = {"seeds": SEEDS, "worlds": WORLDS, "is_main": True}
PART: dict[str, Any] = {"seeds": PART_SEEDS, "worlds": PART_WORLDS, "is_main": False}

REVISED_MOLE = Arm(
    "revised_mole",
    "MoLE of scale 4, base in stage 1, revised KD",
    keys=EXPERTS,
    pretrain=BASE_IN_STAGE_1,
    **MAIN,
)
NONE_MOLE = replace(
    REVISED_MOLE,
    name="none_mole",
    what="the same student, no KD",
    cache=None,
    keys=(*EXPERTS, NONE),
)
REVISED_FULL = Arm(
    "revised_full",
    "full fine-tuning, revised KD",
    keys=(REVISED, *FULL["keys"]),
    pretrain=FULL["pretrain"],
    **MAIN,
)
OFFICIAL_ARM = Arm("official", "MoLE, official KD", "native_int8", OFFICIAL, **MAIN)
"""What ``tune`` starts from; no arm of the study."""
OFFICIAL_TUNED = replace(
    OFFICIAL_ARM,
    name="official_tuned",
    what="MoLE, official KD, tuned",
    keys=(*OFFICIAL, *TUNED),
    finetune=TUNED_RATE,
)
OFFICIAL_RELEASED = replace(
    OFFICIAL_ARM,
    name="official_released",
    what="MoLE, official KD, as released",
    finetune=RELEASED_RATE,
)
PER_TEACHER = replace(
    REVISED_MOLE,
    name="per_teacher",
    what="revised_mole with an expert per teacher",
    keys=(*EXPERTS, "student.mole.experts=per_teacher"),
)
MAIN_ARMS = (
    NONE_MOLE,
    REVISED_MOLE,
    REVISED_FULL,
    OFFICIAL_TUNED,
    OFFICIAL_RELEASED,
    PER_TEACHER,
)


def _minus(part: str, what: str, *keys: str, **others: Any) -> Arm:
    """Return `revised_mole` with a part of the official recipe in its place."""
    changes = {"keys": (*EXPERTS, *keys), **PART, **others}
    return replace(REVISED_MOLE, name=f"revised_minus_{part}", what=what, **changes)


def _plus(part: str, what: str, *keys: str, **others: Any) -> Arm:
    """Return `official_tuned` with a part of the revised recipe in its place."""
    changes = {"keys": (*OFFICIAL_TUNED.keys, *keys), **PART, **others}
    return replace(OFFICIAL_TUNED, name=f"official_plus_{part}", what=what, **changes)


PARTS = {
    "heads": ("distill.adapters=student", "distill.adapters=teacher"),
    "standardised": ("distill.targets=standardised", "distill.targets=raw"),
    "grid": ("distill.grid=student", "distill.grid=native"),
    "blend": ("distill.token_weighting=blend", "distill.token_weighting=softmax"),
    "equal": ("distill.teacher_weighting=equal", "distill.teacher_weighting=anchor"),
    "gate": ("student.mole.use_gate=true", "student.mole.use_gate=false"),
    "balance": ("student.mole.balance=batch", "student.mole.balance=sample"),
    "scale": (SCALE_4, "student.mole.lora_alpha=1"),
    "zero": ("student.mole.init_lora_weights=zero", "student.mole.init_lora_weights=kaiming"),
}
"""Part -> its revised and its official key. Stage 1 with or without the base is no key of these."""
HEADS, GRID, SCALE, ZERO = (PARTS[part] for part in ("heads", "grid", "scale", "zero"))
FIXED = "distill.teacher_weighting=anchor_equal"
"""A fixed share for the anchor: official weights compare adapted tokens, and heads adapt none."""
ONE_KEY = ("standardised", "blend", "gate", "balance", "scale")
"""Parts that change by themselves in both directions."""

MINUS = (
    _minus("heads", "adapters on the teachers' side", HEADS[1]),
    _minus("heads_grid", "and on the teachers' own grids", HEADS[1], GRID[1], cache="native_int8"),
    *(_minus(part, PARTS[part][1], PARTS[part][1]) for part in ONE_KEY),
    _minus("equal", "the anchor has a fixed share of .8", FIXED),
    _minus("base", "the tower's own weights rest in stage 1", pretrain=()),
    _minus("scale_zero", "Kaiming init at a scale of 1/16", SCALE[1], ZERO[1]),
)
PLUS = (
    _plus("grid", "targets on the student's grid", GRID[0]),
    _plus("grid_fixed", "and equal shares beside the anchor's", GRID[0], FIXED),
    _plus("grid_fixed_heads", "and heads on the student's side", GRID[0], FIXED, HEADS[0]),
    *(_plus(part, PARTS[part][0], PARTS[part][0]) for part in ONE_KEY),
    _plus("equal", PARTS["equal"][0], PARTS["equal"][0], "distill.anchor_share=null"),
    _plus("base", "the tower's own weights learn in stage 1", pretrain=BASE_IN_STAGE_1),
    _plus("scale_zero", "zero init at a scale of 4", SCALE[0], ZERO[0]),
    _plus("zero", "zero init at its own scale", ZERO[0]),
)
EXPERT_ARMS = (
    replace(
        REVISED_MOLE,
        name="single_lora",
        what="one LoRA of rank 48, scale 4",
        keys=(
            REVISED,
            "student.mole.num_experts=1",
            "student.mole.r=48",
            "student.mole.lora_alpha=192",
        ),
        **PART,
    ),
    replace(
        REVISED_MOLE,
        name="former_mole",
        what="scale 1, base rests in stage 1",
        keys=(REVISED,),
        pretrain=(),
        **PART,
    ),
    replace(
        REVISED_FULL,
        name="none_full",
        what="full fine-tuning, no KD",
        cache=None,
        keys=(*REVISED_FULL.keys, NONE),
        **PART,
    ),
)
CONTROLS = (
    replace(
        NONE_MOLE,
        name="time_mole",
        what="no KD, trained as long as with",
        matches_time_of="revised_mole",
        **PART,
    ),
    replace(
        NONE_MOLE,
        name="time_teachers",
        what="no KD, as long as with, and as teachers and cache took",
        matches_time_of="revised_mole",
        counts_teachers=True,
        **PART,
    ),
    replace(
        REVISED_MOLE,
        name="shuffled",
        what="revised KD, targets of other images",
        cache="shuffled",
        **PART,
    ),
    replace(
        REVISED_MOLE,
        name="only_clip",
        what="only the teacher without dense labels",
        keys=(*EXPERTS, "distill.teachers=[clip]"),
        **PART,
    ),
    replace(
        REVISED_MOLE,
        name="labels",
        what="dense labels in place of features",
        cache="labels",
        **PART,
    ),
)
IDEAS = tuple(
    replace(REVISED_MOLE, name=f"idea_{name}", what=what, keys=(*EXPERTS, *keys), **PART)
    for name, what, keys in (
        ("summary", "and a global loss on [CLS]", ("distill.summary_weight=1",)),
        ("scaled", "targets with one scale per teacher", ("distill.targets=scaled",)),
        ("balanced", "teachers weighted by their losses", ("distill.teacher_weighting=balanced",)),
        (
            "drop_best",
            "without the teacher of the smallest loss",
            ("distill.kd_weight=0", "loss_terms={without_best_teacher: {weight: 2}}"),
        ),
        ("relations", "and a loss on token pairs", ("loss_terms={relations: {weight: 1}}",)),
    )
)
"""Ideas of other work, added to `revised_mole`; none is tuned."""
ARMS = (*MAIN_ARMS, *MINUS, *PLUS, *EXPERT_ARMS, *CONTROLS, *IDEAS)

PRIMARY = Contrast("revised_mole", "none_mole")
SECONDARY = (
    Contrast("revised_mole", "revised_full"),
    Contrast("revised_mole", "official_tuned"),
    Contrast("per_teacher", "revised_mole"),
)
"""Tested in this order if the primary one holds, each at 5%, until one shows nothing."""
MARGIN = 0.01
"""Experts and full fine-tuning are equal if their difference is smaller, and neither is better."""

_INSTEAD_OF = {
    "revised_minus_heads_grid": "revised_minus_heads",
    "revised_minus_scale_zero": "revised_minus_scale",
    "official_plus_grid_fixed": "official_plus_grid",
    "official_plus_grid_fixed_heads": "official_plus_grid_fixed",
    "official_plus_scale_zero": "official_plus_scale",
}
"""Arms that change a second part -> the arm that has only the first one."""
PART_CONTRASTS = (
    *(Contrast(_INSTEAD_OF.get(arm.name, "revised_mole"), arm.name) for arm in MINUS),
    *(Contrast(arm.name, _INSTEAD_OF.get(arm.name, "official_tuned")) for arm in PLUS),
)
"""Each is what one part of the revised recipe gives, in the revised and in the official one."""
OTHER_CONTRASTS = (
    Contrast("revised_mole", "single_lora"),
    Contrast("revised_mole", "former_mole"),
    Contrast("revised_full", "none_full"),
    Contrast("none_mole", "none_full"),
    *(Contrast("revised_mole", arm.name) for arm in CONTROLS),
    Contrast("shuffled", "none_mole"),
    Contrast("only_clip", "none_mole"),
    Contrast("labels", "none_mole"),
    *(Contrast(arm.name, "revised_mole") for arm in IDEAS),
)
"""Experts, controls and ideas. Like the parts they have intervals and no claim."""
MAIN_OTHERS = (
    *(Contrast(name, "none_mole") for name in ("revised_full", "official_tuned", "per_teacher")),
    Contrast("official_tuned", "official_released"),
)
"""Main arms without a claim."""
MAIN_CONTRASTS = (PRIMARY, *SECONDARY, *MAIN_OTHERS)
"""Main arms on unseen looks and on the probe; intervals and no claim."""
