"""Images of a corpus as batches of pixels, decoded in worker processes ahead of the teacher.

Legend: B batch, C colour channels, H height, W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from movekd.cache.spec import CacheSpec
from movekd.corpus.images import Geometry, ImageTransform, ImageViews
from movekd.corpus.index import Corpus
from movekd.errors import UnreadableImageError


@dataclass(frozen=True)
class PixelBatch:
    """A batch of model input. An unreadable image is all zeros, so that the shape stays.

    Attributes:
        images: position of each image in the corpus.
        pixels_BCHW: float32, normalised for the teacher.
        unreadable: position in the batch -> reason.
    """

    images: list[int]
    pixels_BCHW: Tensor
    unreadable: dict[int, str]

    def pin_memory(self) -> "PixelBatch":
        """Return the batch in page-locked memory; a DataLoader calls this."""
        return PixelBatch(self.images, self.pixels_BCHW.pin_memory(), self.unreadable)


def image_transform(spec: CacheSpec, geometry: Geometry) -> ImageTransform:
    """Return what turns image bytes into this teacher's input in a cache of ``geometry``."""
    return ImageTransform(
        image_size=spec.image_size,
        geometry=spec.geometry or geometry,
        resample=spec.resample,
        mean=spec.mean,
        std=spec.std,
        fill=spec.fill,
    )


def pixel_batches(
    corpus: Corpus,
    transform: ImageTransform,
    batches: Sequence[Sequence[int]],
    *,
    num_workers: int,
    pin_memory: bool = False,
    views: Sequence[Sequence[int]] | None = None,
) -> Iterator[PixelBatch]:
    """Yield one PixelBatch for each list of image positions, in order.

    Args:
        corpus: where the bytes are.
        transform: bytes -> pixels.
        batches: positions in the corpus, a list a batch.
        num_workers: processes that decode ahead; 0 decodes in this one.
        pin_memory: page-locked batches, for a GPU.
        views: which view of each; the base view unless given.
    """
    if views is None:
        views = [[0] * len(batch) for batch in batches]
    loader: DataLoader[Any] = DataLoader(
        _DecodedImages(corpus, transform),
        batch_sampler=[
            list(zip(batch, of_batch, strict=True))
            for batch, of_batch in zip(batches, views, strict=True)
        ],
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=2 if num_workers else None,
    )
    yield from loader


class _DecodedImages(Dataset[tuple[int, "np.ndarray[Any, Any] | str"]]):
    """(Image position, view) -> (position, pixels (3, S, S) or why there are none).

    The last image is kept, decoded: its other views are asked for next.
    """

    def __init__(self, corpus: Corpus, transform: ImageTransform) -> None:
        self.corpus, self.transform = corpus, transform
        self._last: tuple[int, ImageViews] | None = None

    def __getitem__(self, asked: tuple[int, int]) -> "tuple[int, np.ndarray[Any, Any] | str]":
        image, view = asked
        try:
            if self._last is None or self._last[0] != image:
                self._last = image, ImageViews(self.transform, self.corpus.read_image(image))
            return image, self._last[1].pixels(view)
        except UnreadableImageError as error:
            return image, str(error)


def _collate(items: "list[tuple[int, np.ndarray[Any, Any] | str]]") -> PixelBatch:
    unreadable = {i: pixels for i, (_, pixels) in enumerate(items) if isinstance(pixels, str)}
    decoded = [pixels for _, pixels in items if not isinstance(pixels, str)]
    shape = decoded[0].shape if decoded else None
    if shape is None:
        return PixelBatch([image for image, _ in items], torch.empty(0), unreadable)
    stacked = np.zeros((len(items), *shape), np.float32)
    for position, (_, pixels) in enumerate(items):
        if not isinstance(pixels, str):
            stacked[position] = pixels
    return PixelBatch([image for image, _ in items], torch.from_numpy(stacked), unreadable)
