"""Where and how a build runs, and whom it tells: what every part of ``build`` is given."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many images are done, and how many there are."""

CPU_BATCH_SIZE = 8
"""A larger one is no faster there."""


@dataclass(frozen=True)
class BuildOptions:
    """Where and how teachers run; nothing here changes which features are asked for.

    Batch size, dtype and compilation decide the last bits of what comes out, so that those of the
    calibration hold for the whole of a teacher's features.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int | None = 32
    """None: the largest that fits, see ``batch_size``."""
    num_workers: int = 1
    """Processes that decode images."""
    num_threads: int | None = None
    """CPU threads of a forward pass, which decide the last bits as well; None leaves torch's."""
    compile: bool = False
    """Whether ``torch.compile`` fuses the teachers; it takes minutes at the start."""
    concurrent: bool = False
    """Whether several teachers stay on the device together instead of taking turns there."""

    @property
    def images_a_pass(self) -> int:
        """The batch size, or that of a CPU where the largest is yet to be found."""
        return self.batch_size or CPU_BATCH_SIZE
