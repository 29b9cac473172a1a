"""What stands between the student and its teachers during training, and is thrown away after it.

Tokens of a teacher come in and tokens of the student's shape go out (``TeacherAdapter``, official
recipe), or the student's tokens come in and a prediction of the teacher's goes out
(``StudentHead``, revised recipe). The trainer owns one a teacher and hands the results to
``distill.kd_loss``; ``student.checkpoint`` saves them.

Dimensions: B batch, M teacher tokens, N student tokens, T teacher channels, D student channels,
H hidden width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class TeacherAdapter(nn.Module):
    """Brings a teacher's tokens to the student's width and number of tokens (official recipe).

    Linear over channels, GELU, Linear over tokens, both with bias. Student and adapter can shrink
    towards each other, which lowers the loss and teaches nothing: watch
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
    """Predicts one teacher's tokens from the student's, token by token (revised recipe).

    LayerNorm, Linear, GELU, Linear. The normalisation takes the scale of the student's tokens out
    of the loss, and nothing on the target side is trained, so there is nothing to shrink towards.

    Args:
        student_channels: Width of the student.
        teacher_channels: Channels of the teacher's tokens.
        hidden_channels: Width in between; None takes the student's.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, hidden_channels: int | None = None
    ) -> None:
        super().__init__()
        hidden_channels = hidden_channels or student_channels
        self.norm = nn.LayerNorm(student_channels)
        self.hidden = nn.Linear(student_channels, hidden_channels)
        self.output = nn.Linear(hidden_channels, teacher_channels)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return a prediction (B, N, T) of the teacher's tokens on the student's grid."""
        hidden_BNH = F.gelu(self.hidden(self.norm(tokens_BND)))
        prediction_BNT: Tensor = self.output(hidden_BNH)
        return prediction_BNT
