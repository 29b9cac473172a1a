"""Images of a corpus as batches of pixels, decoded in worker processes ahead of the teachers.

An image is decoded once, whoever needs it and at however many sizes. What travels from the
workers, and to the device, is a byte a channel; the device normalises.

Legend: B batch, C colour channels, H height, W width, S side of the square.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from movekd.cache.spec import CacheSpec
from movekd.corpus.images import Geometry, ImageTransform, Square, decode_image
from movekd.corpus.index import Corpus
from movekd.errors import UnreadableImageError

Images = Sequence[int] | npt.NDArray[np.int64]
"""Positions in a corpus."""
_LOADED_TOGETHER = 8
"""Images that a worker decodes and hands over at once."""


@dataclass(frozen=True)
class PixelBatch:
    """A batch of one teacher's input. An unreadable image is black, so that the shape stays.

    Attributes:
        images: position of each image in the corpus.
        levels_BHWC: uint8 (B, S, S, 3); page-locked if asked for.
        shown: width and height of the image in each square, see ``Square``.
        unreadable: position in the batch -> reason.
        transform: what normalises them.
    """

    images: list[int]
    levels_BHWC: Tensor
    shown: list[tuple[int, int]]
    unreadable: dict[int, str]
    transform: ImageTransform

    def pixels(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the normalised pixels (B, 3, S, S) on ``device``: what ``transform`` returns."""
        levels_BHWC = self.levels_BHWC.to(device, non_blocking=True).int()
        table = torch.from_numpy(self.transform.normalisation_table).to(device)
        size = self.transform.image_size
        pixels_BCHW = torch.empty(len(self.images), 3, size, size, dtype=dtype, device=device)
        for channel in range(3):
            level = levels_BHWC[..., channel].reshape(-1)
            pixels_BCHW[:, channel] = table[channel].index_select(0, level).view(-1, size, size)
        padding_C11 = torch.from_numpy(self.transform.padding_C).to(device)[:, None, None]
        for pixels_CHW, (width, height) in zip(pixels_BCHW, self.shown, strict=True):
            if (width, height) != (size, size):
                pixels_CHW[:, height:, :] = padding_C11
                pixels_CHW[:, :, width:] = padding_C11
        return pixels_BCHW


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
    """Yield one PixelBatch for each list of image positions, in order; see ``ImageStream``."""
    wanted = [image for batch in batches for image in batch]
    stream = ImageStream(
        corpus, {transform: wanted}, wanted, num_workers=num_workers, pin_memory=pin_memory
    )
    for batch in batches:
        yield stream.take(batch, transform)


class ImageStream:
    """Decoded images, each kept until all who want it have taken it.

    Args:
        corpus: where the bytes are.
        wanted: transform -> positions of the images that ``take`` will be asked for, each as
            often as it will be. Equal transforms are one: an image is resized once for both.
        order: positions in the order in which they are needed first; what is taken out of it
            waits in memory for its turn. Repeats are dropped.
        num_workers: processes that decode ahead; 0 decodes in this one.
        pin_memory: page-locked batches, for a GPU.
    """

    def __init__(
        self,
        corpus: Corpus,
        wanted: Mapping[ImageTransform, Images],
        order: Images,
        *,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._pin_memory = pin_memory
        self._left = {
            transform: np.bincount(np.asarray(images, np.int64), minlength=len(corpus))
            for transform, images in wanted.items()
        }
        self._transforms = list(self._left)
        ordered = np.asarray(order, np.int64)
        images = ordered[np.sort(np.unique(ordered, return_index=True)[1])]
        use = np.stack([left[images] > 0 for left in self._left.values()], axis=1)
        groups = [
            list(range(start, min(start + _LOADED_TOGETHER, len(images))))
            for start in range(0, len(images), _LOADED_TOGETHER)
        ]
        self._loaded = iter(
            DataLoader(
                _DecodedImages(corpus, images, use, self._transforms),
                batch_sampler=groups,
                num_workers=num_workers,
                collate_fn=_collate,
                prefetch_factor=4 if num_workers else None,
            )
        )
        self._squares: dict[tuple[int, ImageTransform], tuple[Tensor, int, int]] = {}
        self._unreadable: dict[int, str] = {}

    def take(self, images: Sequence[int], transform: ImageTransform) -> PixelBatch:
        """Return a batch of images, waiting for those that are not decoded yet."""
        left, size = self._left[transform], transform.image_size
        levels_BHWC = torch.empty(
            (len(images), size, size, 3), dtype=torch.uint8, pin_memory=self._pin_memory
        )
        shown, unreadable = [(size, size)] * len(images), {}
        for place, image in enumerate(images):
            while (image, transform) not in self._squares and image not in self._unreadable:
                self._load_more()
            if image in self._unreadable:
                unreadable[place] = self._unreadable[image]
                levels_BHWC[place] = 0
                continue
            levels_BHWC[place], *shown_here = self._squares[image, transform]
            shown[place] = shown_here[0], shown_here[1]
            left[image] -= 1
            if not left[image]:
                del self._squares[image, transform]
        return PixelBatch(list(images), levels_BHWC, shown, unreadable, transform)

    def _load_more(self) -> None:
        loaded: _Loaded = next(self._loaded)
        self._unreadable |= loaded.unreadable
        for index, found in loaded.squares.items():
            for place, (image, width, height) in enumerate(found.shown):
                key = image, self._transforms[index]
                self._squares[key] = found.levels_BHWC[place], width, height


@dataclass(frozen=True)
class _Squares:
    """Images at one size: uint8 (B, S, S, 3), and for each its position, width and height."""

    levels_BHWC: Tensor
    shown: list[tuple[int, int, int]]


@dataclass(frozen=True)
class _Loaded:
    """What a worker hands over: the index of a transform -> squares; position -> reason."""

    squares: dict[int, _Squares]
    unreadable: dict[int, str]


_Item = tuple[int, "dict[int, Square] | str"]


class _DecodedImages(Dataset[_Item]):
    """Index -> (position, squares by the index of their transform, or why there are none)."""

    def __init__(
        self,
        corpus: Corpus,
        images: npt.NDArray[np.int64],
        use: npt.NDArray[np.bool_],
        transforms: Sequence[ImageTransform],
    ) -> None:
        self._corpus, self._transforms = corpus, transforms
        self._images, self._use = images, use

    def __getitem__(self, index: int) -> _Item:
        image = int(self._images[index])
        try:
            decoded = decode_image(self._corpus.read_image(image))
            chosen = np.flatnonzero(self._use[index]).tolist()
            return image, {which: self._transforms[which].square(decoded) for which in chosen}
        except UnreadableImageError as error:
            return image, str(error)


def _collate(items: list[_Item]) -> _Loaded:
    unreadable = {image: found for image, found in items if isinstance(found, str)}
    by_transform: dict[int, list[tuple[int, Square]]] = {}
    for image, found in items:
        if not isinstance(found, str):
            for which, square in found.items():
                by_transform.setdefault(which, []).append((image, square))
    squares = {}
    for which, some in by_transform.items():
        levels_BHWC = torch.from_numpy(np.stack([square.levels_HWC for _, square in some]))
        shown = [(image, square.width, square.height) for image, square in some]
        squares[which] = _Squares(levels_BHWC, shown)
    return _Loaded(squares, unreadable)
