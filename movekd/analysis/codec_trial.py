"""Compare features stored with one codec on one grid with the teacher's exact features.

Input: exact features, and gradients of ``kd_gradient``, batch by batch. Output: the errors that
``analysis.fidelity`` reports. The exact features are resized to the stored grid first: a smaller
grid is a choice of the user, not an error of the codec.

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
    """Cosine per image between the gradients from decoded and from exact targets."""

    mean: float
    worst: float


@dataclass(frozen=True)
class Fidelity:
    """Errors of one codec on one grid for one teacher.

    With z a token in standardised channels and z' the same decoded, both on the stored grid:

        error        = ||z' - z|| / ||z||          mean and maximum over all tokens
        error_limited = error of z and z' limited to +-8; outliers hide nothing in it
        energy_error = sum ||z' - z||^2 / sum ||z||^2   over all tokens
        token_cosine = z'.z / (||z'|| ||z||)       mean over all tokens
        attention_l1 = sum_n |a'[n] - a[n]|        mean over images and heads, of the [CLS] row

    The gradients are those of ``kd_gradient`` for two students: one that has learned nothing, and
    one whose residual is 10% of its target (``near``), where the codec's error matters most.
    """

    codec: str
    grid: int
    row_bytes: int
    error_mean: float
    error_max: float
    error_limited_mean: float
    error_limited_max: float
    energy_error: float
    token_cosine: float
    attention_l1: float | None
    """None if the spec stores no attention."""
    revised_untrained: GradientCosine
    revised_near: GradientCosine
    official_untrained: GradientCosine | None
    """None unless the grid is the native one, which the official recipe's adapter needs."""
    official_near: GradientCosine | None
    is_spec: bool
    """Whether this is what the spec asks for."""


class CodecTrial:
    """One codec on one grid, while batches pass through it.

    Attributes:
        refusal: why the codec cannot store the features, or None.
    """

    def __init__(self, codec: str, grid: int, is_native: bool, student_grid: int) -> None:
        self.refusal: str | None = None
        self._codec, self._grid, self._is_native = codec, grid, is_native
        self._student_grid = student_grid
        self._stored_by = codecs.codec(codec)
        self._row_bytes = 0
        self._num_tokens, self._error_sum, self._error_max, self._cosine_sum = 0, 0.0, 0.0, 0.0
        self._limited_sum, self._limited_max = 0.0, 0.0
        self._squared_error, self._squared_norm = 0.0, 0.0
        self._attention: list[float] = []
        self._gradients: dict[str, list[float]] = defaultdict(list)

    def store(self, exact: LiveFeatures, stats: ChannelStats) -> LossTargets | None:
        """Encode and decode a batch and record the errors; return the decoded targets of the loss.

        Returns None and sets ``refusal`` if the codec cannot store the batch.
        """
        try:
            stats = stats.for_codec(self._stored_by)
            stored = self._stored_by.encode(exact.tokens_BND, stats)
        except CacheError as error:
            self.refusal = str(error)
            return None
        errors = self._stored_by.error(exact.tokens_BND, stored, stats)
        self._error_sum += errors.sum.item()
        self._error_max = max(self._error_max, errors.max.item())
        self._limited_sum += errors.limited_sum.item()
        self._limited_max = max(self._limited_max, errors.limited_max.item())
        self._squared_error += errors.squared_error.item()
        self._squared_norm += errors.squared_norm.item()
        attention = exact.cls_attention_BHN
        if attention is not None:
            stored["cls_attention"] = attention.half()
            difference_BHN = (stored["cls_attention"].float() - attention).abs()
            self._attention += difference_BHN.sum(-1).mean(-1).tolist()
        decoded = TeacherTargets(stored, stats, self._stored_by)
        cosine_BN = _cosine(decoded.standardised_BND, stats.standardise(exact.tokens_BND))
        self._cosine_sum += cosine_BN.sum().item()
        self._num_tokens += cosine_BN.numel()
        num_tokens, width, cls_width, num_heads = exact.shape
        self._row_bytes = teacher_layout(
            self._codec, num_tokens, width, cls_width=cls_width, num_heads=num_heads
        ).row_bytes
        return self._targets(
            decoded.standardised_BND, decoded.tokens_BND, decoded.cls_attention_BHN
        )

    def exact_targets(self, exact: LiveFeatures, stats: ChannelStats) -> LossTargets:
        """Return the exact targets of the loss."""
        standardised_BND = stats.standardise(exact.tokens_BND)
        return self._targets(standardised_BND, exact.tokens_BND, exact.cls_attention_BHN)

    def compare(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """Record the cosine per image between the gradients of a batch."""
        for name, gradient_BND in expected.items():
            cosine_B = _cosine(found[name].flatten(1), gradient_BND.flatten(1))
            self._gradients[name] += cosine_B.tolist()

    def cosines(self) -> dict[str, GradientCosine]:
        """Return the cosines of all gradients that were compared, by their names."""
        return {
            name: GradientCosine(float(np.mean(values)), min(values))
            for name, values in self._gradients.items()
        }

    def result(self, is_spec: bool) -> Fidelity:
        """Return the errors over all batches."""
        cosines = self.cosines()
        return Fidelity(
            codec=self._codec,
            grid=self._grid,
            row_bytes=self._row_bytes,
            error_mean=self._error_sum / self._num_tokens,
            error_max=self._error_max,
            error_limited_mean=self._limited_sum / self._num_tokens,
            error_limited_max=self._limited_max,
            energy_error=self._squared_error / max(self._squared_norm, 1e-30),
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


def _cosine(first_XD: Tensor, second_XD: Tensor) -> Tensor:
    """Return the cosine over the last dimension, float64; 1 where both are zero."""
    first_XD, second_XD = first_XD.double(), second_XD.double()
    norms_X = first_XD.norm(dim=-1) * second_XD.norm(dim=-1)
    cosine_X = (first_XD * second_XD).sum(-1) / norms_X.clamp(min=1e-300)
    are_both_zero = (first_XD == 0).all(-1) & (second_XD == 0).all(-1)
    return torch.where(are_both_zero, 1.0, cosine_X)
