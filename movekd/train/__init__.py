"""Pipeline 2: the student and the projector train against a cache; no teacher is loaded.

``load_config`` reads student.yaml, ``train`` runs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from movekd.train.config import TrainConfig, load_config
    from movekd.train.run import TrainSummary, train

__all__ = [
    "TrainConfig",
    "TrainSummary",
    "load_config",
    "train",
]

_MODULES = {
    "TrainConfig": "movekd.train.config",
    "TrainSummary": "movekd.train.run",
    "load_config": "movekd.train.config",
    "train": "movekd.train.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
