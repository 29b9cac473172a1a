"""Build, save, load and export the student: a vision tower with LoRA experts, inside LLaVA.

Importing this package registers the experts with PEFT as a tuner.
"""

from movekd.student.adapters import StudentHead, TeacherAdapter
from movekd.student.hf_loading import register_auto_classes
from movekd.student.mole import (
    MoleConfig,
    Routing,
    checkpoint_contexts,
    clear_routing,
    recorded_routing,
    restricted,
    routing,
    save_tower,
)
from movekd.student.official.state_dict import load_official_state_dict, official_state_dict
from movekd.student.tokenization import (
    TokenizedConversation,
    tokenize_conversation,
    tokenize_question,
)
from movekd.student.tokenizer import load_tokenizer

__all__ = [
    "MoleConfig",
    "Routing",
    "StudentHead",
    "TeacherAdapter",
    "TokenizedConversation",
    "checkpoint_contexts",
    "clear_routing",
    "load_official_state_dict",
    "load_tokenizer",
    "official_state_dict",
    "recorded_routing",
    "register_auto_classes",
    "restricted",
    "routing",
    "save_tower",
    "tokenize_conversation",
    "tokenize_question",
]
