"""TeacherTargets: a batch of one teacher's features as they are stored, decoded where it is used.

``reader`` makes them and the DataLoader's workers pass them on. ``train.model`` decodes them on the
training device, so that the stored bytes cross the bus and not the decoded floats.

Legend: B batch, N tokens, D channels, H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from movekd.cache.codecs import Codec
from movekd.cache.stats import ChannelStats


@dataclass(frozen=True)
class TeacherTargets:
    """A batch of one teacher's features as they are stored; the properties decode.

    Attributes:
        stored: the arrays of the teacher's group, the batch first; all on one device.
        stats: channel statistics on any device.
        codec: how the tokens in ``stored`` are decoded.
    """

    stored: Mapping[str, Tensor]
    stats: ChannelStats
    codec: Codec

    def __len__(self) -> int:
        return len(self.stored["tokens"])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherTargets":
        """Return the batch on ``device``: the stored bytes move, not the decoded floats."""
        moved = {n: a.to(device, non_blocking=non_blocking) for n, a in self.stored.items()}
        return replace(self, stored=moved, stats=self.stats.to(torch.device(device)))

    def pin_memory(self) -> "TeacherTargets":
        """Return the batch in page-locked memory; a DataLoader calls this."""
        return replace(self, stored={n: a.pin_memory() for n, a in self.stored.items()})

    @property
    def tokens_BND(self) -> Tensor:
        """Tokens in the teacher's units, float32 (B, N, D)."""
        return self.codec.decode(self.stored, self.stats)

    @property
    def standardised_BND(self) -> Tensor:
        """Tokens standardised by the calibration's channel statistics, float32 (B, N, D)."""
        return self.codec.decode_standardised(self.stored, self.stats)

    @property
    def rotated_BND(self) -> Tensor:
        """``standardised_BND`` in the codec's rotation, ``codec.rotate``; the fastest to decode."""
        return self.codec.decode_rotated(self.stored, self.stats)

    @property
    def rotates(self) -> bool:
        """Whether ``rotated_BND`` is another basis than ``standardised_BND``."""
        return self.codec.rotates

    def rotate(self, standardised: Tensor) -> Tensor:
        """Return standardised channels (..., D) in the rotation of ``rotated_BND``, float32."""
        return self.codec.rotate(standardised, self.stats)

    @property
    def scaled_BND(self) -> Tensor:
        """Tokens minus their channel means, over one number per teacher, float32 (B, N, D).

        The number is the root of the mean square of the channels' sealed deviations. So all
        teachers weigh the same, and the channels of one teacher keep their shares. The squared
        error then equals that of PHI-S, whose rotation does not change a sum of squares.

        Source: Ranzinger et al., PHI-S (arXiv 2410.01680), isotropic standardisation.
        """
        std_D = self.stats.to(self.stored["tokens"].device).std_D
        return self.standardised_BND * (std_D / std_D.square().mean().sqrt())

    @property
    def cls_BD(self) -> Tensor | None:
        """[CLS] embedding, float32 (B, D). None if the teacher has none."""
        return self.stored["cls"].float() if "cls" in self.stored else None

    @property
    def cls_attention_BHN(self) -> Tensor | None:
        """Attention of [CLS] over the patches of each head, float32 (B, H, N), or None."""
        return self.stored["cls_attention"].float() if "cls_attention" in self.stored else None
