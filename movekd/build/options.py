"""Where and how a build runs, and whom it tells: what every part of ``build`` is given."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many images are done, and how many there are."""


@dataclass(frozen=True)
class BuildOptions:
    """Where and how teachers run; nothing here changes which features are asked for.

    Batch size and dtype decide the last bits of what comes out, so that those of the calibration
    hold for the whole of a teacher's features.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 32
    num_workers: int = 1
