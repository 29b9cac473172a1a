"""Add a Mixture of LoRA Experts (MoLE) to a vision tower, as a tuner of PEFT.

``get_peft_model(clip_vision_model, MoleConfig(...))`` gives every MLP of a vision tower experts and
a router. ``routing(model)`` then returns what the routers chose in the last forward pass, for the
balance loss. Inside ``restricted(model, teacher)`` only a teacher's own expert and the shared ones
may be chosen. ``save_tower`` writes a tower whose base was trained as well. Importing this package
registers the tuner with PEFT.
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
from movekd.student.mole.restriction import checkpoint_contexts, restricted
from movekd.student.mole.saving import save_tower

__all__ = [
    "MoleConfig",
    "MoleLayer",
    "MoleModel",
    "Routing",
    "checkpoint_contexts",
    "clear_routing",
    "recorded_routing",
    "restricted",
    "routing",
    "save_tower",
]

# peft.utils.register_peft_method takes only members of PEFT's PeftType. A str enum hashes and
# compares as its members do, and PEFT looks a tuner up in these three tables.
_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MolePeftType.MOLE] = MoleConfig
_mapping.PEFT_TYPE_TO_TUNER_MAPPING[MolePeftType.MOLE] = MoleModel
_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MolePeftType.MOLE] = MoleModel.prefix
