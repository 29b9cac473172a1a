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
from movekd.corpus.images import Geometry, ImageTransform
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
) -> Iterator[PixelBatch]:
    """Yield one PixelBatch for each list of image positions, in order.

    Args:
        corpus: where the bytes are.
        transform: bytes -> pixels.
        batches: positions in the corpus, a list a batch.
        num_workers: processes that decode ahead; 0 decodes in this one.
        pin_memory: page-locked batches, for a GPU.
    """
    loader: DataLoader[Any] = DataLoader(
        _DecodedImages(corpus, transform),
        batch_sampler=[list(batch) for batch in batches],
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=2 if num_workers else None,
    )
    yield from loader


class _DecodedImages(Dataset[tuple[int, "np.ndarray[Any, Any] | str"]]):
    """Image position -> (position, pixels (3, S, S) or why there are none)."""

    def __init__(self, corpus: Corpus, transform: ImageTransform) -> None:
        self.corpus, self.transform = corpus, transform

    def __getitem__(self, image: int) -> "tuple[int, np.ndarray[Any, Any] | str]":
        data = self.corpus.read_image(image)
        try:
            return image, self.transform(data)
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
