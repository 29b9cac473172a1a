"""Map tokens between the student and its teachers; needed only in training.

``TeacherAdapter`` (official recipe) maps a teacher's tokens to the student's shape. ``StudentHead``
(revised recipe) predicts a teacher's tokens from the student's. The trainer has one per teacher,
and ``distill.kd_loss`` takes the results. ``student.checkpoint`` saves them.

Dimensions: B batch, M teacher tokens, N student tokens, T teacher channels, D student channels,
H hidden width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class TeacherAdapter(nn.Module):
    """Map a teacher's tokens to the student's width and number of tokens (official recipe).

    Linear over channels, GELU, Linear over tokens, both with bias. Student and adapter can shrink
    towards each other, which lowers the loss without learning: watch
    ``distill.token_statistics``.

    Args:
        teacher_channels: Channels of the teacher's tokens.
        teacher_tokens: Number of the teacher's tokens.
        student_channels: Width of the student.
        student_tokens: Number of the student's patch tokens.

    Source: MoVE-KD's encoder adapters; ``channels`` is its ``*_adapter_1``, ``tokens`` its
    ``*_adapter_2``.
    """

    def __init__(
        self, teacher_channels: int, teacher_tokens: int, student_channels: int, student_tokens: int
    ) -> None:
        super().__init__()
        self.channels = nn.Linear(teacher_channels, student_channels)
        self.tokens = nn.Linear(teacher_tokens, student_tokens)

    def forward(self, tokens_BMT: Tensor) -> Tensor:
        """Return tokens (B, N, D) for teacher tokens (B, M, T)."""
        hidden_BMD = F.gelu(self.channels(tokens_BMT))
        tokens_BDN: Tensor = self.tokens(hidden_BMD.transpose(1, 2))
        return tokens_BDN.transpose(1, 2)


class StudentHead(nn.Module):
    """Predict one teacher's tokens from the student's, token by token (revised recipe).

    LayerNorm, Linear, GELU, Linear. The normalisation removes the scale of the student's tokens,
    and the targets are not trained, so the two cannot shrink towards each other.

    Args:
        student_channels: Width of the student.
        teacher_channels: Channels of the teacher's tokens.
        hidden_channels: Width of the hidden layer. Default: the student's.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, hidden_channels: int | None = None
    ) -> None:
        super().__init__()
        hidden_channels = hidden_channels or student_channels
        self.norm = nn.LayerNorm(student_channels)
        self.hidden = nn.Linear(student_channels, hidden_channels)
        self.output = nn.Linear(hidden_channels, teacher_channels)

    def forward(
        self, tokens_BND: Tensor, rotate: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return a prediction (B, N, T) of the teacher's tokens on the student's grid.

        Args:
            tokens_BND: the student's tokens.
            rotate: return the prediction in this rotation of the teacher's channels. The last
                layer is rotated, R (W x + b) = (R W) x + R b, which costs less than the tokens.
        """
        hidden_BNH = F.gelu(self.hidden(self.norm(tokens_BND)))
        if rotate is not None:
            weight_TH, bias_T = rotate(self.output.weight.T).T, rotate(self.output.bias)
            dtype = self.output.weight.dtype
            return F.linear(hidden_BNH, weight_TH.to(dtype), bias_T.to(dtype))
        prediction_BNT: Tensor = self.output(hidden_BNH)
        return prediction_BNT
