"""TeacherTargets: a batch of one teacher's features as they are stored, decoded where it is used.

``reader`` makes them, the DataLoader's workers hand them on, ``train.model`` decodes them on the
training device: int8 is what crosses the bus.

Legend: B batch, N tokens, D channels, H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache import codec
from movekd.cache.codec import ChannelStats


@dataclass(frozen=True)
class TeacherTargets:
    """A batch of one teacher's features as they are stored; the properties decode.

    Attributes:
        stored: the arrays of the teacher's group, the batch first; all on one device.
        stats: channel statistics, moved to that device when something is decoded.
    """

    stored: Mapping[str, Tensor]
    stats: ChannelStats

    def __len__(self) -> int:
        return len(self.stored["tokens"])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherTargets":
        """Return the batch on ``device``: the stored bytes move, not the decoded floats."""
        moved = {n: a.to(device, non_blocking=non_blocking) for n, a in self.stored.items()}
        return replace(self, stored=moved, stats=self.stats.to(torch.device(device)))

    def pin_memory(self) -> "TeacherTargets":
        """Return the batch in page-locked memory; a DataLoader calls this."""
        return replace(self, stored={n: a.pin_memory() for n, a in self.stored.items()})

    def numpy(self) -> npt.NDArray[np.float32]:
        """Return the tokens decoded by numpy alone, (B, N, D), equal to ``tokens_BND`` on a CPU."""
        stored = {name: array.cpu().numpy() for name, array in self.stored.items()}
        stats = self.stats.to(torch.device("cpu"))
        return codec.decode_numpy(stored, stats.mean_D.numpy(), stats.std_D.numpy())

    @property
    def tokens_BND(self) -> Tensor:
        """Tokens in the teacher's units, float32 (B, N, D)."""
        return codec.decode(self.stored, self.stats)

    @property
    def standardised_BND(self) -> Tensor:
        """Tokens standardised by the calibration's channel statistics, float32 (B, N, D)."""
        return codec.decode_standardised(self.stored, self.stats)

    @property
    def scaled_BND(self) -> Tensor:
        """Tokens less their channel means, over one number a teacher, float32 (B, N, D).

        The number is the root of the mean variance of the channels: teachers count alike, and
        loud channels keep their share within one. The squared error then is that of PHI-S, whose
        rotation leaves a sum of squares as it is.

        Source: Ranzinger et al., PHI-S (arXiv 2410.01680), isotropic standardisation.
        """
        std_D = self.stats.to(self.stored["tokens"].device).std_D
        return self.standardised_BND * (std_D / std_D.square().mean().sqrt())

    @property
    def cls_BD(self) -> Tensor | None:
        """[CLS] embedding, float32 (B, D), or None where the teacher has none."""
        return self.stored["cls"].float() if "cls" in self.stored else None

    @property
    def cls_attention_BHN(self) -> Tensor | None:
        """Attention of [CLS] over the patches a head, float32 (B, H, N), or None."""
        return self.stored["cls_attention"].float() if "cls_attention" in self.stored else None
