"""Options of a build (device, dtype, batch size, processes), and what all its steps share."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from movekd.cache.catalog import Catalog
from movekd.cache.storage import Storage
from movekd.corpus.index import Corpus

Progress = Callable[[str, int, int], None]
"""Called with a label, the number of images done, and their total."""

CPU_BATCH_SIZE = 8
"""Larger batches are no faster on a CPU."""


@dataclass(frozen=True)
class BuildOptions:
    """Where and how teachers run. Nothing here selects which features are stored.

    Batch size, dtype and compilation decide the last bits of the features. Therefore those of the
    calibration hold for all features of a teacher.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int | None = 32
    """None: the largest that fits, see ``batch_size``."""
    num_workers: int = 1
    """Processes that decode images."""
    num_threads: int | None = None
    """CPU threads of a forward pass, which decide the last bits too. Default: torch's setting."""
    compile: bool = False
    """Whether ``torch.compile`` fuses the teachers; compiling takes minutes at the start."""
    concurrent: bool = False
    """Whether all teachers stay on the device together instead of taking turns."""

    @property
    def forward_batch_size(self) -> int:
        """The batch size, or that of a CPU while the largest one is not known yet."""
        return self.batch_size or CPU_BATCH_SIZE


Tell = Callable[[str], None]
"""Receives a sentence that a user should know now, not at the end of the build."""


def print_error(sentence: str) -> None:
    """Print a sentence to standard error."""
    print(sentence, file=sys.stderr)


@dataclass(frozen=True)
class BuildContext:
    """What all steps of one build share."""

    storage: Storage
    corpus: Corpus
    catalog: Catalog
    options: BuildOptions
    progress: Progress
    tell: Tell = print_error
    """Receives what a user should know now, not at the end of the build."""
