"""The model that ships: a vision tower with a Mixture of LoRA Experts inside LLaVA.

Names below are imported when first used, so that looking at the package costs neither torch nor
PEFT. Importing ``MoleConfig`` is what makes PEFT know the tuner.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from movekd.student.adapters import StudentHead, TeacherAdapter
    from movekd.student.mole import (
        MoleConfig,
        Routing,
        clear_routing,
        recorded_routing,
        routing,
        save_tower,
    )
    from movekd.student.official import load_official_state_dict, official_state_dict
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
    "clear_routing",
    "load_official_state_dict",
    "load_tokenizer",
    "official_state_dict",
    "recorded_routing",
    "routing",
    "save_tower",
    "tokenize_conversation",
    "tokenize_question",
]

_MODULES = {
    "StudentHead": "movekd.student.adapters",
    "TeacherAdapter": "movekd.student.adapters",
    "load_official_state_dict": "movekd.student.official",
    "official_state_dict": "movekd.student.official",
    "TokenizedConversation": "movekd.student.tokenization",
    "load_tokenizer": "movekd.student.tokenizer",
    "tokenize_conversation": "movekd.student.tokenization",
    "tokenize_question": "movekd.student.tokenization",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "movekd.student.mole")), name)
