"""Measure how much of a teacher's tokens is in a student's: R2 of a ridge regression, linear CKA.

Input: tokens of both on one grid. Output: figures, each with values on resampled images. Pure
functions on tensors, in float64; ``teacher_fit`` feeds them.

Legend: I images, N tokens per image, D channels of the student, T of the teacher, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STRENGTHS = (1e-6, 1e-4, 1e-2, 1.0)
"""Penalties of the ridge regression, as shares of the student's variance."""
_BLOCK_IMAGES = 8


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, from which a ridge regression and its error are found.

    Attributes:
        xx: of the student's channels and a one with themselves, (D + 1, D + 1).
        xy: with the teacher's channels, (D + 1, T).
        yy: squares of the teacher's channels, (T,).
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, student_XD: Tensor, teacher_XT: Tensor) -> "Moments":
        """Return the sums over X tokens."""
        x, y = _with_one(student_XD), teacher_XT.double()
        return cls(x.T @ x, x.T @ y, y.square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def ridge(self, strength: float) -> Tensor:
        """Return weights (D + 1, T), the last row the intercept, which is not penalised.

        They are those of scikit-learn's ``Ridge(alpha=strength * tokens)`` on standardised
        channels of the student.
        """
        count, sums_D = self.xx[-1, -1], self.xx[-1, :-1]
        squares_D = self.xx.diagonal()[:-1]
        scatter_D = squares_D - sums_D.square() / count
        # a constant channel says nothing that the intercept does not; the sum must be invertible
        penalty_D = strength * scatter_D.clamp(min=0) + 1e-12 * squares_D + 1e-30
        penalty = torch.diag(torch.cat([penalty_D, penalty_D.new_zeros(1)]))
        weights: Tensor = torch.linalg.solve(self.xx + penalty, self.xy)
        return weights

    def squared_error(self, weights: Tensor) -> float:
        """Return the sum of the squared errors of a regression, over tokens and channels."""
        fitted = (weights * (self.xx @ weights - 2 * self.xy)).sum()
        return float(self.yy.sum() + fitted)


class Prediction(NamedTuple):
    """How well a regression predicts the tokens of each image, float64.

    Attributes:
        errors_IT: sums of squared errors.
        sums_IT: sums of the teacher's channels.
        squares_IT: sums of their squares.
        num_tokens: tokens per image.
    """

    errors_IT: Tensor
    sums_IT: Tensor
    squares_IT: Tensor
    num_tokens: int

    @classmethod
    def of(cls, weights: Tensor, student_IND: Tensor, teacher_INT: Tensor) -> "Prediction":
        """Return it for some images."""
        goal = teacher_INT.double()
        error = goal - _with_one(student_IND) @ weights
        return cls(error.square().sum(1), goal.sum(1), goal.square().sum(1), goal.shape[1])

    @classmethod
    def join(cls, parts: Sequence["Prediction"]) -> "Prediction":
        """Return it for the images of all parts."""
        return cls(
            torch.cat([part.errors_IT for part in parts]),
            torch.cat([part.sums_IT for part in parts]),
            torch.cat([part.squares_IT for part in parts]),
            parts[0].num_tokens,
        )

    def r2(self, weights_RI: Tensor, channels: slice = slice(None)) -> Tensor:
        """Return R2 over a range of channels for R ways to count the images, (R,).

        1 - squared errors / squared deviations, both summed over the channels: scikit-learn's
        ``r2_score`` with ``variance_weighted``.
        """
        errors, sums, squares = (
            weights_RI @ part[:, channels]
            for part in (self.errors_IT, self.sums_IT, self.squares_IT)
        )
        counts_R1 = weights_RI.sum(1, keepdim=True) * self.num_tokens
        deviations_R = (squares - sums.square() / counts_R1).sum(1)
        return 1 - errors.sum(1) / deviations_R


def linear_cka(student_IND: Tensor, teacher_INT: Tensor, weights_RI: Tensor) -> Tensor:
    """Return the linear CKA of tokens for R ways to count the images, (R,).

    Channels are centred over all tokens, and resamples keep that centre. In a resample, an image
    that is drawn twice is not compared with its copy: such pairs are equal in any model, and would
    raise the CKA of all resamples above that of the images themselves.

    Source: Kornblith et al. (arXiv 1905.00414), ||Y'X||^2 / (||X'X|| ||Y'Y||).
    """
    x, y = (_centred(tokens) for tokens in (student_IND, teacher_INT))
    num, tokens = x.shape[:2]
    sums = torch.zeros(3, num, num, dtype=torch.float64)  # of xy, xx, yy for each pair of images
    flat_x, flat_y = x.flatten(0, 1), y.flatten(0, 1)
    for start in range(0, num, _BLOCK_IMAGES):
        some = slice(start, start + _BLOCK_IMAGES)
        pairs = (-1, tokens, num, tokens)
        k = (x[some].flatten(0, 1) @ flat_x.T).view(pairs)
        m = (y[some].flatten(0, 1) @ flat_y.T).view(pairs)
        for at, product in enumerate((k * m, k.square(), m.square())):
            sums[at, some] = product.sum((1, 3))
    within = sums.diagonal(dim1=1, dim2=2)
    between = torch.einsum("ri,sij,rj->sr", weights_RI, sums - torch.diag_embed(within), weights_RI)
    xy, xx, yy = between + within @ weights_RI.T
    cka_R: Tensor = xy / (xx * yy).sqrt()
    return cka_R


def _centred(tokens_IND: Tensor) -> Tensor:
    tokens = tokens_IND.double()
    return tokens - tokens.mean((0, 1))


def _with_one(tokens: Tensor) -> Tensor:
    values = tokens.double()
    return torch.cat([values, values.new_ones((*values.shape[:-1], 1))], -1)
