"""Fill in and check the keys of experts per teacher: `student.mole.experts: per_teacher`.

Used by ``config``.
"""

from typing import TYPE_CHECKING

from movekd.distill.config import DistillConfig
from movekd.errors import ConfigError
from movekd.student.config import MoleKeys

if TYPE_CHECKING:
    from movekd.train.config import TrainConfig


def fill_teachers(mole: MoleKeys, distill: DistillConfig | None) -> MoleKeys:
    """Return the experts' keys with the names of the teachers that have one."""
    if mole.experts == "shared" or mole.teachers is not None or distill is None:
        return mole
    return mole.model_copy(update={"teachers": list(distill.teachers)})


def check_experts(config: "TrainConfig") -> None:
    """Refuse experts per teacher that cannot learn, or whose teachers are not known.

    Raises:
        ConfigError: names the key.
    """
    mole, distill = config.student.mole, config.distill
    if mole is None or mole.experts == "shared":
        return
    if config.recipe == "official":
        raise ConfigError(
            "student.mole.experts is per_teacher, and recipe: official is the released method, "
            "which has only shared experts. Set recipe: revised, or experts: shared."
        )
    if mole.teachers is None:
        raise ConfigError(
            "student.mole.experts is per_teacher, and distill is null; expected the names of the "
            "teachers that have experts. Set student.mole.teachers to those of the stage that "
            "distilled."
        )
    if distill is None:
        return
    if set(distill.teachers) != set(mole.teachers):
        raise ConfigError(
            f"distill.teachers is {', '.join(distill.teachers)}, and student.mole.teachers is "
            f"{', '.join(mole.teachers)}; expected the same ones, in any order, since each has an "
            "expert. Leave student.mole.teachers out, or distil from those."
        )
    if config.stage == "distill" and mole.free_kd_share == 0:
        raise ConfigError(
            "student.mole.free_kd_share is 0, and stage: distill has no text loss: nothing would "
            "teach the routers to choose between the teachers' experts. Set it above 0."
        )
