"""Trunk: what every provider makes of a spec, and what ``teachers.load`` reads features from.

Legend: B batch, C channels, H x W pixels, T tokens with prefix, D width, R x S a feature map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Trunk:
    """A vision network with its weights, and what is needed to read its features.

    Attributes:
        module: the network, on the CPU.
        run: pixels_BCHW -> the network's own output, (B, T, D) tokens or a (B, D, R, S) map.
        blocks: its transformer blocks in order; empty for a network without (a convolutional one).
        num_prefix: tokens before the patches.
        has_cls: whether the first of them is a [CLS] token; the others are registers.
        has_neck: whether ``run`` ends with SAM's neck.
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    blocks: Sequence[nn.Module] = ()
    num_prefix: int = 0
    has_cls: bool = False
    has_neck: bool = False


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
