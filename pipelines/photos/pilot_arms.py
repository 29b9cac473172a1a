"""The trainings of the pilot: the tower or its experts, teachers, forms of the loss, a control."""

from dataclasses import dataclass

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
        cache: ``shuffled``: every image has the targets of another one. A codec: the int8 cache,
            recoded to it.
        is_final: whether the test images are read with it.
        compared_with: arms that it is compared with on the test images.
    """

    name: str
    keys: tuple[str, ...] = ()
    teachers: tuple[str, ...] = TWO
    steps: int = 250
    cache: str = "cache"
    is_final: bool = False
    compared_with: tuple[str, ...] = ("full",)


FULL = full("1e-4")
SCALE_4 = "student.mole.lora_alpha=128"
"""With the rank of distill.yaml, 32; with a rank of 128 the scale is 1."""
CNN_8 = ("distill.teacher_weighting=anchor_equal", "distill.anchor_share=0.2")
CODECS = ("lloyd4", "lloyd2", "lowrank16")
EXPERTS_BASE = (
    *experts("1e-3"),
    SCALE_4,
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
    Arm("full_cnn_8", (*FULL, *CNN_8), is_final=True),
    Arm("experts_base", EXPERTS_BASE, is_final=True),
    Arm("experts_5e-3", experts("5e-3")),
    Arm("experts_scale_4", (*experts("2e-3"), SCALE_4)),
    Arm(
        "experts_cnn_8",
        (*experts("2e-3"), *CNN_8),
        is_final=True,
        compared_with=("full", "full_cnn_8"),
    ),
    Arm("experts_r128", (*experts("1e-3"), "student.mole.r=128", SCALE_4)),
    *(Arm(f"full_{codec}", FULL, cache=codec, is_final=True) for codec in CODECS),
)
