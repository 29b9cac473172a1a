"""MixedTargets: a batch of one teacher's targets from caches that standardise in different ways.

Each cache has the channel statistics of its corpus. A student has one head per teacher, so its
targets need one scale: that of the run's first cache. Tokens of the other caches are decoded into
the teacher's units and standardised with the statistics of the first.

Legend: B batch, N tokens, D channels, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from movekd.cache.stats import ChannelStats
from movekd.cache.targets import TeacherTargets


@dataclass(frozen=True)
class MixedTargets:
    """Targets of several caches, with the properties of ``TeacherTargets``.

    Attributes:
        parts: the targets of each cache.
        places: of each part, where its rows stand in the batch, int64.
        stats: channel statistics of the run.
    """

    parts: tuple[TeacherTargets, ...]
    places: tuple[Tensor, ...]
    stats: ChannelStats
    rotates: bool = False
    """As ``TeacherTargets.rotates``; caches need not share a rotation."""

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MixedTargets":
        """Return the batch on ``device``."""
        return replace(
            self,
            parts=tuple(part.to(device, non_blocking) for part in self.parts),
            places=tuple(place.to(device, non_blocking=non_blocking) for place in self.places),
            stats=self.stats.to(torch.device(device)),
        )

    def pin_memory(self) -> "MixedTargets":
        """Return the batch in page-locked memory; a DataLoader calls this."""
        return replace(self, parts=tuple(part.pin_memory() for part in self.parts))

    @property
    def tokens_BND(self) -> Tensor:
        """Tokens in the teacher's units, float32 (B, N, D)."""
        return self._together(lambda part: part.tokens_BND)

    @property
    def standardised_BND(self) -> Tensor:
        """Tokens standardised by the run's channel statistics, float32 (B, N, D)."""
        return self._together(self._standardise)

    @property
    def scaled_BND(self) -> Tensor:
        """Tokens minus the run's channel means, over one number, as in ``TeacherTargets``."""
        std_D = self.stats.std_D
        return self.standardised_BND * (std_D / std_D.square().mean().sqrt())

    @property
    def rotated_BND(self) -> Tensor:
        """``standardised_BND``: nothing is rotated."""
        return self.standardised_BND

    def rotate(self, standardised: Tensor) -> Tensor:
        """Return the argument: nothing is rotated."""
        return standardised

    @property
    def cls_BD(self) -> Tensor | None:
        """[CLS] embedding, float32 (B, D), or None."""
        return self._together_or_none(lambda part: part.cls_BD)

    @property
    def cls_attention_BHN(self) -> Tensor | None:
        """Attention of [CLS] over the patches of each head, float32 (B, H, N), or None."""
        return self._together_or_none(lambda part: part.cls_attention_BHN)

    def _standardise(self, part: TeacherTargets) -> Tensor:
        own, run = part.stats, self.stats
        same = (torch.equal(own.mean_D, run.mean_D), torch.equal(own.std_D, run.std_D))
        return part.standardised_BND if all(same) else run.standardise(part.tokens_BND)

    def _together_or_none(self, read: Callable[[TeacherTargets], Tensor | None]) -> Tensor | None:
        found = [read(part) for part in self.parts]
        if any(each is None for each in found):
            return None
        return self._put([each for each in found if each is not None])

    def _together(self, read: Callable[[TeacherTargets], Tensor]) -> Tensor:
        return self._put([read(part) for part in self.parts])

    def _put(self, found: list[Tensor]) -> Tensor:
        """Return the parts' rows in the order of the batch."""
        order = torch.argsort(torch.cat(self.places))
        return torch.cat(found)[order]
