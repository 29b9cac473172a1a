"""Mixture of LoRA Experts (MoLE) as a PEFT tuner; importing this package registers it with PEFT.

``get_peft_model(clip_vision_model, MoleConfig(...))`` gives every MLP of a vision tower its
experts and a router; ``routing(model)`` then returns what the routers chose in the last forward
pass, for the balance loss. ``save_tower`` writes a tower whose base learned as well. Used by
``student.vlm`` and ``student.checkpoint``.
"""

from peft import mapping as _mapping

from movekd.student.mole.config import MoleConfig, MolePeftType
from movekd.student.mole.layer import (
    MoleLayer,
    Routing,
    clear_routing,
    recorded_routing,
    routing,
)
from movekd.student.mole.model import MoleModel
from movekd.student.mole.saving import save_tower

__all__ = [
    "MoleConfig",
    "MoleLayer",
    "MoleModel",
    "Routing",
    "clear_routing",
    "recorded_routing",
    "routing",
    "save_tower",
]

# PEFT's own register_peft_method takes members of PEFT's enum only. A str enum of ours hashes and
# compares like one of theirs, so these three tables are all that PEFT ever consults.
_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MolePeftType.MOLE] = MoleConfig
_mapping.PEFT_TYPE_TO_TUNER_MAPPING[MolePeftType.MOLE] = MoleModel
_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MolePeftType.MOLE] = MoleModel.prefix
