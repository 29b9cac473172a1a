"""Pipeline 2: the student and the projector train against a cache; no teacher is loaded.

``load_config`` reads student.yaml, ``train`` runs it.
"""

from movekd.train.config import TrainConfig, load_config
from movekd.train.run import TrainSummary, train

__all__ = [
    "TrainConfig",
    "TrainSummary",
    "load_config",
    "train",
]
