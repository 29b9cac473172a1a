"""Interface between providers and ``teachers.teacher``: a network and how to read its features.

Legend: B batch, C channels, H W pixels (in pixels_BCHW) or H heads (in cls_attention_BHN),
T tokens with prefix, N patch tokens, D width, R x S a feature map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from torch import Tensor, nn

from movekd.cache.grid import resize_attention, resize_tokens
from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, did_you_mean


class OutputShape(NamedTuple):
    """Sizes of a teacher's output; None if the output has no such tensor."""

    num_tokens: int
    width: int
    cls_width: int | None
    num_heads: int | None


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's features of a batch of images; float32, on the teacher's device.

    Attributes:
        tokens_BND: patch tokens on the native grid, row-major, without prefix tokens.
        cls_BD: the [CLS] embedding of the same layer, or the output of the attention-pooling
            head. None unless the spec asks for it.
        cls_attention_BHN: attention of [CLS] to every patch in the block before that layer, or
            of the head's probe. None unless the spec asks for it. A row is a softmax over all
            tokens with the prefix dropped: it sums to less than 1 for a token, to 1 for a probe.
    """

    tokens_BND: Tensor
    cls_BD: Tensor | None = None
    cls_attention_BHN: Tensor | None = None

    @property
    def shape(self) -> OutputShape:
        """Number of tokens, width, width of [CLS] and heads of its attention."""
        cls, attention = self.cls_BD, self.cls_attention_BHN
        return OutputShape(
            self.tokens_BND.shape[1],
            self.tokens_BND.shape[2],
            None if cls is None else cls.shape[1],
            None if attention is None else attention.shape[1],
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the output with ``function`` applied to each of its tensors."""
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: function(tensor) for name, tensor in present.items()})

    def resize(self, side: int) -> Self:
        """Return the output with tokens and attention resized to a grid, in float32."""
        tokens_BND, attention = resize_tokens(self.tokens_BND.float(), side), self.cls_attention_BHN
        if attention is not None:
            attention = resize_attention(attention.float(), side)
        return replace(self, tokens_BND=tokens_BND, cls_attention_BHN=attention)


@dataclass(frozen=True)
class Backbone:
    """A vision network with its weights, and what is needed to read its features.

    Attributes:
        module: the network, on the CPU.
        run: pixels_BCHW -> the network's output: (B, T, D) tokens, a (B, D, R, S) map, or a
            TeacherOutput.
        blocks: transformer blocks in order; empty for a convolutional network.
        num_prefix: tokens before the patches.
        has_cls: whether the first prefix token is [CLS]; the others are registers.
        has_neck: whether ``run`` ends with SAM's neck.
        pool: attention-pooling head, which reads the patches of ``run``'s output.
        is_complete: whether ``run`` returns a TeacherOutput with all that the spec asks for.
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor | TeacherOutput]
    blocks: Sequence[nn.Module] = ()
    num_prefix: int = 0
    has_cls: bool = False
    has_neck: bool = False
    pool: nn.Module | None = None
    is_complete: bool = False


def check_name(spec: CacheSpec, known: Sequence[str]) -> None:
    """Refuse a model name that the provider does not know.

    Raises:
        ConfigError: names the nearest one.
    """
    if spec.model not in known:
        raise ConfigError(
            f"{spec.provider} has no model '{spec.model}'.{did_you_mean(spec.model, known)} "
            f"Correct `model` of '{spec.name}'."
        )
