"""Interface between a probe and what it measures: a model that turns images into tokens.

``Encoder`` (students and towers), ``CachedTeacher`` and ``analysis.live_teacher`` have it, so that
all of them stand in one table.

Legend: B images, N patch tokens on a square grid, D channels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from movekd.corpus.transforms import Geometry


class ImageTokens(Protocol):
    """Features of a batch of images, float32."""

    @property
    def tokens_BND(self) -> Tensor:
        """Patch tokens, row-major over a square grid."""

    @property
    def cls_BD(self) -> Tensor | None:
        """The [CLS] embedding, if the model has one; it may have another width."""


class EncoderTokens(NamedTuple):
    """``ImageTokens`` of an encoder."""

    tokens_BND: Tensor
    cls_BD: Tensor | None


class ProbedModel(Protocol):
    """A frozen model that a probe measures."""

    @property
    def identity(self) -> str | None:
        """SHA-256 of all that decides a feature. None: reading again costs less than keeping."""

    @property
    def geometry(self) -> Geometry:
        """How its images became square."""

    def encode(self, keys: Sequence[str], contents: Iterable[bytes]) -> ImageTokens:
        """Return the tokens of images.

        Args:
            keys: SHA-256 of each image's file.
            contents: the files, read when they are asked for.
        """


def pooled(output: ImageTokens) -> dict[str, Tensor]:
    """Return ``cls`` (if the model has one) and ``patches``, the mean of patches: (B, D), on CPU.

    All of ``movekd probe`` but the fit to teachers is measured on these two.
    """
    patches = {"patches": output.tokens_BND.mean(1).cpu()}
    cls_BD = output.cls_BD
    return patches if cls_BD is None else {"cls": cls_BD.contiguous().cpu()} | patches
