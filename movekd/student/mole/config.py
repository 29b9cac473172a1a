"""Configure a Mixture of LoRA Experts: the config that PEFT saves in adapter_config.json.

Made from the student's YAML or from a saved adapter; read by ``layer.MoleLayer``.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from peft import PeftConfig

from movekd.config import validate
from movekd.errors import ConfigError
from movekd.student.config import MoleKeys

LoraInit = Literal["kaiming", "zero"]
"""Initial values of the experts.

kaiming: both factors Kaiming-uniform, so the student differs from its base at step 0 (official).
zero: the second factor is zero, so the student is its base at step 0 (revised).
"""


_CHECKED_KEYS = ("num_experts", "r", "lora_alpha", "lora_dropout", "use_gate", "init_lora_weights")
"""Attributes whose ranges are those of student.yaml."""


class MolePeftType(StrEnum):
    """PEFT's name for the tuner; name and value must agree, as in PEFT's enum."""

    MOLE = "MOLE"


@dataclass
class MoleConfig(PeftConfig):
    """Configuration of a Mixture of LoRA Experts.

    The defaults are those of `recipe: revised_2026_11`; `revised` has ``lora_alpha=4 * r``. The
    official recipe is ``MoleConfig(lora_alpha=1.0, use_gate=False, init_lora_weights="kaiming")``.

    Attributes:
        num_experts: Experts per layer that no single teacher owns: all, without ``teachers``.
        teachers: Names of the teachers that have an expert per layer for themselves. These experts
            come first, in this order, and the ``num_experts`` shared ones behind them. None: only
            shared ones.
        r: Rank of each expert.
        lora_alpha: The experts' output is scaled by ``lora_alpha / r``; None means ``r``.
        lora_dropout: Dropout on the input of both LoRA pairs (fc1's and fc2's).
        use_gate: Multiply an expert's output by the router's probability, so that the task's loss
            reaches the router.
        init_lora_weights: ``"kaiming"`` or ``"zero"``, see ``LoraInit``.
        target_modules: Names of the MLP modules, or one regular expression.
        exclude_modules: Names (or one regular expression) of modules to leave out.
        layers_to_transform: Indices of the blocks that get experts, at least one; None means all. A
            student that is read at hidden state -2 leaves the last block out.
        layers_pattern: Name of the list of blocks, if PEFT cannot find it.
        modules_to_save: Other modules to train and save whole with the adapter.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    num_experts: int = 3
    r: int = 32
    lora_alpha: float | None = None
    lora_dropout: float = 0.05
    use_gate: bool = True
    init_lora_weights: LoraInit = "zero"
    target_modules: list[str] | str = field(default_factory=lambda: ["mlp"])
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    teachers: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MolePeftType.MOLE
        keys = {key: getattr(self, key) for key in _CHECKED_KEYS}
        if self.teachers is not None:
            keys |= {"experts": "per_teacher", "teachers": self.teachers}
        checked = validate(MoleKeys, keys, "MoleConfig")
        self.lora_alpha = float(self.r) if checked.lora_alpha is None else checked.lora_alpha
        if self.layers_to_transform == []:
            raise ConfigError(
                "MoleConfig has layers_to_transform=[]; expected the index of at least one block, "
                "since PEFT takes an empty list for all of them. Name the blocks, leave it out "
                "for all, or put no MoLE into the tower."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "MoleConfig has layers_to_transform beside target_modules as a regular expression; "
                "PEFT would ignore the former. Give target_modules as a list, or put the layers "
                "into the expression."
            )

    @property
    def scale(self) -> float:
        """Factor ``s = lora_alpha / r`` on the experts' output."""
        assert self.lora_alpha is not None  # set in __post_init__
        return self.lora_alpha / self.r

    @property
    def num_all_experts(self) -> int:
        """Experts per layer, those of teachers included."""
        return len(self.teachers or ()) + self.num_experts
