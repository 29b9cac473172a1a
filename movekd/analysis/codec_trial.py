"""One way of storing a teacher, a codec and a grid, held against what the teacher said.

Comes in: exact features, and gradients of ``kd_gradient``, batch by batch. Goes out: figures for
``analysis.fidelity``. The exact features are those on the stored grid: that a smaller grid keeps
less is a choice, not an error (and one that the revised recipe does not see).

Legend: B batch, N tokens, D channels, H heads.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from movekd.analysis.kd_gradient import LossTargets
from movekd.cache import codecs
from movekd.cache.grid import resize_attention, resize_tokens
from movekd.cache.layout import teacher_layout
from movekd.cache.stats import ChannelStats
from movekd.cache.targets import TeacherTargets
from movekd.errors import CacheError
from movekd.extract.run_teacher import LiveFeatures


@dataclass(frozen=True)
class GradientCosine:
    """Cosine, an image each, between the gradients from decoded and from exact targets."""

    mean: float
    worst: float


@dataclass(frozen=True)
class Fidelity:
    """One way of storing one teacher, held against what the teacher said.

    With z a token in standardised channels and z' the same decoded, both on the stored grid:

        error        = ||z' - z|| / ||z||          mean and maximum over all tokens
        token_cosine = z'.z / (||z'|| ||z||)       mean over all tokens
        attention_l1 = sum_n |a'[n] - a[n]|        mean over images and heads, of the [CLS] row

    The gradients are those of ``kd_gradient``, at two students: one that has learned nothing, and
    one whose residual is 10% of its target (``near``), where a codec's error weighs most.
    """

    codec: str
    grid: int
    row_bytes: int
    error_mean: float
    error_max: float
    token_cosine: float
    attention_l1: float | None
    """None where the spec stores no attention."""
    revised_untrained: GradientCosine
    revised_near: GradientCosine
    official_untrained: GradientCosine | None
    """None off the native grid, on which the official recipe's adapter works."""
    official_near: GradientCosine | None
    is_spec: bool
    """Whether this is what the spec asks for."""


class CodecTrial:
    """One way of storing while batches go through it.

    Attributes:
        refusal: why the codec cannot hold what it was given, or None.
    """

    def __init__(self, codec: str, grid: int, is_native: bool, student_grid: int) -> None:
        self.refusal: str | None = None
        self._codec, self._grid, self._is_native = codec, grid, is_native
        self._student_grid = student_grid
        self._stored_by = codecs.codec(codec)
        self._row_bytes = 0
        self._num_tokens, self._error_sum, self._error_max, self._cosine_sum = 0, 0.0, 0.0, 0.0
        self._attention: list[float] = []
        self._gradients: dict[str, list[float]] = defaultdict(list)

    def store(self, exact: LiveFeatures, stats: ChannelStats) -> LossTargets | None:
        """Encode and decode a batch, note the error; return what the losses would get.

        None, with ``refusal`` set, if the codec cannot hold it.
        """
        try:
            stored = self._stored_by.encode(exact.tokens_BND, stats)
        except CacheError as error:
            self.refusal = str(error)
            return None
        error_sum, error_max = self._stored_by.error(exact.tokens_BND, stored, stats)
        self._error_sum += error_sum.item()
        self._error_max = max(self._error_max, error_max.item())
        attention = exact.cls_attention_BHN
        if attention is not None:
            stored["cls_attention"] = attention.half()
            difference_BHN = (stored["cls_attention"].float() - attention).abs()
            self._attention += difference_BHN.sum(-1).mean(-1).tolist()
        decoded = TeacherTargets(stored, stats, self._stored_by)
        cosine_BN = _cosine(decoded.standardised_BND, stats.standardise(exact.tokens_BND))
        self._cosine_sum += cosine_BN.sum().item()
        self._num_tokens += cosine_BN.numel()
        self._row_bytes = self._bytes_of_a_row(exact)
        return self._targets(
            decoded.standardised_BND, decoded.tokens_BND, decoded.cls_attention_BHN
        )

    def exact_targets(self, exact: LiveFeatures, stats: ChannelStats) -> LossTargets:
        """Return what the losses would get if nothing was lost."""
        standardised_BND = stats.standardise(exact.tokens_BND)
        return self._targets(standardised_BND, exact.tokens_BND, exact.cls_attention_BHN)

    def compare(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """Note the cosine between the gradients of a batch, an image each."""
        for name, gradient_BND in expected.items():
            cosine_B = _cosine(found[name].flatten(1), gradient_BND.flatten(1))
            self._gradients[name] += cosine_B.tolist()

    def result(self, is_spec: bool) -> Fidelity:
        """Return the figures of everything that was stored."""
        cosines = {
            name: GradientCosine(float(np.mean(values)), min(values))
            for name, values in self._gradients.items()
        }
        return Fidelity(
            codec=self._codec,
            grid=self._grid,
            row_bytes=self._row_bytes,
            error_mean=self._error_sum / self._num_tokens,
            error_max=self._error_max,
            token_cosine=self._cosine_sum / self._num_tokens,
            attention_l1=float(np.mean(self._attention)) if self._attention else None,
            revised_untrained=cosines["revised_untrained"],
            revised_near=cosines["revised_near"],
            official_untrained=cosines.get("official_untrained"),
            official_near=cosines.get("official_near"),
            is_spec=is_spec,
        )

    def _targets(
        self, standardised_BND: Tensor, raw_BND: Tensor, attention_BHN: Tensor | None
    ) -> LossTargets:
        side = self._student_grid
        return LossTargets(
            resize_tokens(standardised_BND, side),
            raw_BND if self._is_native else None,
            None if attention_BHN is None else resize_attention(attention_BHN, side),
        )

    def _bytes_of_a_row(self, exact: LiveFeatures) -> int:
        cls, attention = exact.cls_BD, exact.cls_attention_BHN
        return teacher_layout(
            self._codec,
            exact.tokens_BND.shape[1],
            exact.tokens_BND.shape[2],
            cls_width=None if cls is None else cls.shape[1],
            num_heads=None if attention is None else attention.shape[1],
        ).row_bytes


def _cosine(first_XD: Tensor, second_XD: Tensor) -> Tensor:
    """Return the cosine over the last dimension, float64; 1 where both are zero."""
    first_XD, second_XD = first_XD.double(), second_XD.double()
    norms_X = first_XD.norm(dim=-1) * second_XD.norm(dim=-1)
    cosine_X = (first_XD * second_XD).sum(-1) / norms_X.clamp(min=1e-300)
    are_both_zero = (first_XD == 0).all(-1) & (second_XD == 0).all(-1)
    return torch.where(are_both_zero, 1.0, cosine_X)
