"""Decide which parameters of a student learn, and which parts a run saves.

Input: the resolved run; ``trained`` names its parts. With ``student.language_model_lora`` the part
``language_model`` is the adapter, and everything else in the language model stays as it was.
"""

from collections.abc import Iterable
from typing import Any

from movekd.student.checkpoint import part_of
from movekd.student.language_lora import LORA_PART, is_adapter
from movekd.train.config import TrainConfig
from movekd.train.trained_keys import ENCODER_PARTS


def set_trained(config: TrainConfig, vlm: Any) -> None:
    """Let the parameters of the trained parts learn, and no other of the model."""
    trained, has_lora = config.trained or [], config.student.language_model_lora is not None
    for name, parameter in vlm.named_parameters():
        part = part_of(name)
        is_frozen_base = has_lora and part == "language_model" and not is_adapter(name)
        parameter.requires_grad_(part in trained and not is_frozen_base)


def parts_to_save(config: TrainConfig, loaded: Iterable[str]) -> list[str]:
    """Return the parts that learned, in this stage or an earlier one.

    Args:
        config: the resolved run.
        loaded: the parts that came from ``init_from``.
    """
    learned: set[str] = set(config.trained or [])
    if config.student.language_model_lora is not None and "language_model" in learned:
        learned = learned - {"language_model"} | {LORA_PART}
    parts = learned | set(loaded)
    return sorted(parts & set(ENCODER_PARTS) if config.stage == "distill" else parts)
