"""Backbone: what every provider makes of a spec, and what ``teachers.teacher`` reads features from.

Legend: B batch, C channels, H W pixels (in pixels_BCHW) or H heads (in cls_attention_BHN),
T tokens with prefix, N patch tokens, D width, R x S a feature map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about a batch of images; float32, on the teacher's device.

    Attributes:
        tokens_BND: patch tokens on the native grid, row-major, without prefix tokens.
        cls_BD: the [CLS] embedding of the same layer, or the output of the attention-pooling
            head; None unless the spec asks for it.
        cls_attention_BHN: how much [CLS] attends to every patch in the block before that layer,
            or the head's probe does; None unless asked for. A row is a softmax over all tokens
            with the prefix dropped: it sums to less than 1 for a token, to 1 for a probe.
    """

    tokens_BND: Tensor
    cls_BD: Tensor | None = None
    cls_attention_BHN: Tensor | None = None


@dataclass(frozen=True)
class Backbone:
    """A vision network with its weights, and what is needed to read its features.

    Attributes:
        module: the network, on the CPU.
        run: pixels_BCHW -> the network's own output, (B, T, D) tokens or a (B, D, R, S) map, or
            a whole TeacherOutput.
        blocks: its transformer blocks in order; empty for a network without (a convolutional one).
        num_prefix: tokens before the patches.
        has_cls: whether the first of them is a [CLS] token; the others are registers.
        has_neck: whether ``run`` ends with SAM's neck.
        pool: its attention-pooling head, which reads the patches of ``run``'s output.
        is_complete: whether ``run`` returns a TeacherOutput, with all that the spec asks for.
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
