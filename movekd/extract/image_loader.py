"""Load batches of images for the teachers; worker processes decode them ahead.

An image is decoded once for all teachers and sizes. Pixels travel from the workers to the device as
uint8. The device normalises them.

Legend: B batch, C colour channels, H height, W width, S side of the square.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from movekd.cache.spec import CacheSpec
from movekd.corpus.decode import decode_image
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import Colour, Geometry, ImageTransform, ImageViews, Square
from movekd.corpus.worker_process import end_with_parent
from movekd.errors import CorpusError, UnreadableImageError

RowIds = Sequence[int] | npt.NDArray[np.int64]
_LOADED_TOGETHER, _GROUP_BYTES = 8, 32 * 2**20
"""Limits of a group, in images and bytes. A worker decodes a group at once, and four wait."""


@dataclass(frozen=True)
class PixelBatch:
    """A batch of one teacher's input. An unreadable image is black, so that all shapes are equal.

    Attributes:
        images: position of each image in the corpus.
        levels_BHWC: uint8 (B, S, S, 3); page-locked if asked for.
        shown: width and height of the image in each square, see ``Square``.
        unreadable: position in the batch -> reason.
        transform: normalises the levels.
    """

    images: list[int]
    levels_BHWC: Tensor
    shown: list[tuple[int, int]]
    unreadable: dict[int, str]
    transform: ImageTransform

    def pixels(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the normalised pixels (B, 3, S, S) on ``device``: what ``transform`` returns."""
        levels_BHWC = self.levels_BHWC.to(device, non_blocking=True).int()
        table, padding_C11 = _constants(self.transform, str(device))
        size = self.transform.image_size
        pixels_BCHW = torch.empty(len(self.images), 3, size, size, dtype=dtype, device=device)
        for channel in range(3):
            level = levels_BHWC[..., channel].reshape(-1)
            pixels_BCHW[:, channel] = table[channel].index_select(0, level).view(-1, size, size)
        for pixels_CHW, (width, height) in zip(pixels_BCHW, self.shown, strict=True):
            if (width, height) != (size, size):
                pixels_CHW[:, height:, :] = padding_C11
                pixels_CHW[:, :, width:] = padding_C11
        return pixels_BCHW


@lru_cache(maxsize=16)
def _constants(transform: ImageTransform, device: str) -> tuple[Tensor, Tensor]:
    """Return the table of levels (3, 256) and the padding (3, 1, 1), on a device.

    Cached, because the copy waits for all work that is queued on the device.
    """
    table = torch.from_numpy(transform.normalisation_table).to(device)
    return table, torch.from_numpy(transform.padding_C).to(device)[:, None, None]


def image_transform(spec: CacheSpec, geometry: Geometry) -> ImageTransform:
    """Return the transform from image bytes to this teacher's input, in a cache of ``geometry``."""
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
    """Yield one PixelBatch for each list of image positions, in order; see ``ImageLoader``.

    Args:
        corpus: where the bytes are.
        transform: bytes -> pixels.
        batches: positions in the corpus, one list per batch.
        num_workers: processes that decode ahead; 0 decodes in this one.
        pin_memory: page-locked batches, for a GPU.
        views: which view of each. Default: the base view.
    """
    images = np.array([image for batch in batches for image in batch], np.int64)
    of_each = np.zeros(len(images), np.int16)
    if views is not None:
        of_each = np.array([view for batch in views for view in batch], np.int16)
    row_ids = np.arange(len(images))
    loader = ImageLoader(
        corpus,
        images,
        of_each,
        {transform: row_ids},
        row_ids,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    start = 0
    for batch in batches:
        yield loader.next_batch(row_ids[start : start + len(batch)], transform)
        start += len(batch)


class ImageLoader:
    """Decoded views of images; each stays in memory until every teacher has used it.

    A row id is an index into ``images`` and ``views``, such as a position in a catalog.

    Args:
        corpus: where the bytes are.
        images: row id -> position of its image in the corpus.
        views: row id -> which view of it.
        wanted: transform -> the row ids of all its batches, repeats included. Transforms that
            differ only in mean and std count as one: an image is resized once.
        order: row ids in the order in which they are needed first; repeats are dropped. What is
            used out of this order waits in memory.
        num_workers: processes that decode ahead; 0 decodes in this one.
        pin_memory: page-locked batches, for a GPU.
    """

    def __init__(
        self,
        corpus: Corpus,
        images: npt.NDArray[np.int64],
        views: npt.NDArray[np.int16],
        wanted: Mapping[ImageTransform, RowIds],
        order: RowIds,
        *,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._images, self._pin_memory = images, pin_memory
        self._left: dict[ImageTransform, npt.NDArray[np.int32]] = {}
        for transform, wanted_ids in wanted.items():
            square = square_key(transform)
            left = np.bincount(np.asarray(wanted_ids, np.int64), minlength=len(images))
            self._left[square] = self._left.get(square, 0) + left.astype(np.int32)
        self._transforms = list(self._left)
        ordered = np.asarray(order, np.int64)
        row_ids = ordered[np.sort(np.unique(ordered, return_index=True)[1])]
        use = np.stack([left[row_ids] > 0 for left in self._left.values()], axis=1)
        dataset = _DecodedViews(corpus, images[row_ids], views[row_ids], use, self._transforms)
        cuts = _cuts(images[row_ids], sum(3 * square.image_size**2 for square in self._left))
        self._loaded = zip(
            _groups(row_ids, cuts),
            DataLoader(
                dataset,
                batch_sampler=_groups(np.arange(len(row_ids)), cuts),
                num_workers=num_workers,
                collate_fn=_collate,
                worker_init_fn=end_with_parent,
                prefetch_factor=4 if num_workers else None,
                # The default one is PyTorch's global generator: drawing its seed would disturb
                # another thread that draws random weights.
                generator=torch.Generator(),
            ),
            strict=True,
        )
        self._is_shared = num_workers > 0
        self._squares: dict[tuple[int, ImageTransform], tuple[Tensor, int, int]] = {}
        self._unreadable: dict[int, str] = {}

    def next_batch(self, row_ids: RowIds, transform: ImageTransform) -> PixelBatch:
        """Return a batch of row ids; wait for those that are not decoded yet."""
        square, size = square_key(transform), transform.image_size
        left = self._left[square]
        wanted = [int(row_id) for row_id in row_ids]
        levels_BHWC = torch.empty(
            (len(wanted), size, size, 3), dtype=torch.uint8, pin_memory=self._pin_memory
        )
        shown, unreadable = [(size, size)] * len(wanted), {}
        for index, row_id in enumerate(wanted):
            while (row_id, square) not in self._squares and row_id not in self._unreadable:
                self._load_more()
            if row_id in self._unreadable:
                unreadable[index] = self._unreadable[row_id]
                levels_BHWC[index] = 0
                continue
            levels_BHWC[index], width, height = self._squares[row_id, square]
            shown[index] = width, height
            left[row_id] -= 1
            if not left[row_id]:
                del self._squares[row_id, square]
        images = self._images[wanted].tolist()
        return PixelBatch(images, levels_BHWC, shown, unreadable, transform)

    def _load_more(self) -> None:
        row_ids, loaded = next(self._loaded)
        if loaded.failure is not None:
            raise loaded.failure
        for index, reason in loaded.unreadable.items():
            self._unreadable[row_ids[index]] = reason
        for which, (levels_BHWC, shown) in loaded.squares.items():
            if self._is_shared:  # a tensor from a worker holds a file descriptor until it is freed
                levels_BHWC = levels_BHWC.clone()
            for at, (index, width, height) in enumerate(shown):
                key = row_ids[index], self._transforms[which]
                self._squares[key] = levels_BHWC[at], width, height


def square_key(transform: ImageTransform) -> ImageTransform:
    """Return a transform without mean and std: teachers with equal keys share decoded squares."""
    plain: Colour = (0.0, 0.0, 0.0)
    return replace(transform, mean=plain, std=(1.0, 1.0, 1.0), fill=transform.padding_colour)


def _cuts(images: npt.NDArray[np.int64], view_bytes: int) -> npt.NDArray[np.int64]:
    """Return where groups of a few images begin; consecutive views of one image stay together."""
    if not len(images):
        return np.empty(0, np.int64)
    number = np.concatenate([[0], np.cumsum(images[1:] != images[:-1])])
    views_each = len(images) / (number[-1] + 1)
    together = max(min(_LOADED_TOGETHER, int(_GROUP_BYTES / (views_each * view_bytes))), 1)
    starts = np.flatnonzero(np.diff(number // together, prepend=-1))
    return np.append(starts, len(images))


def _groups(values: npt.NDArray[np.int64], cuts: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """Yield values in groups, lazily: a corpus can have millions of rows."""
    for start, end in itertools.pairwise(cuts):
        yield values[start:end].tolist()


@dataclass(frozen=True)
class _Loaded:
    """A group of views that one worker decoded together."""

    squares: dict[int, tuple[Tensor, list[tuple[int, int, int]]]]
    """Index of a transform -> uint8 (B, S, S, 3), and of each its index in the group and size."""
    unreadable: dict[int, str]
    """Index in the group -> why it has no squares."""
    failure: CorpusError | None
    """Why the corpus itself cannot be read, which ends the build."""


_Item = dict[int, Square] | str | CorpusError
"""Squares by the index of their transform, or why the view has none, or why the corpus has none.

A worker returns its errors, because a raised one would arrive with a traceback as its message.
"""


class _DecodedViews(Dataset[_Item]):
    """Views of images. Keeps the last image decoded, because its other views usually follow."""

    def __init__(
        self,
        corpus: Corpus,
        images: npt.NDArray[np.int64],
        views: npt.NDArray[np.int16],
        use: npt.NDArray[np.bool_],
        transforms: Sequence[ImageTransform],
    ) -> None:
        self._corpus, self._transforms = corpus, transforms
        self._images, self._views, self._use = images, views, use
        self._last: tuple[int, list[ImageViews] | str | CorpusError] = (-1, "")

    def __getitem__(self, index: int) -> _Item:
        image, view = int(self._images[index]), int(self._views[index])
        if self._last[0] != image:
            self._last = image, self._decode(image)
        found = self._last[1]
        if isinstance(found, str | CorpusError):
            return found
        try:
            chosen = np.flatnonzero(self._use[index]).tolist()
            return {which: found[which].square(view) for which in chosen}
        except UnreadableImageError as error:
            return str(error)

    def _decode(self, image: int) -> list[ImageViews] | str | CorpusError:
        try:
            decoded = decode_image(self._corpus.read_image(image))
        except UnreadableImageError as error:
            return str(error)
        except CorpusError as error:
            return error
        return [ImageViews(transform, decoded) for transform in self._transforms]


def _collate(items: list[_Item]) -> _Loaded:
    unreadable = {index: item for index, item in enumerate(items) if isinstance(item, str)}
    by_transform: dict[int, list[tuple[int, Square]]] = {}
    for index, item in enumerate(items):
        if isinstance(item, dict):
            for which, square in item.items():
                by_transform.setdefault(which, []).append((index, square))
    squares = {}
    for which, some in by_transform.items():
        levels_BHWC = torch.from_numpy(np.stack([square.levels_HWC for _, square in some]))
        shown = [(index, square.width, square.height) for index, square in some]
        squares[which] = levels_BHWC, shown
    failures = (item for item in items if isinstance(item, CorpusError))
    return _Loaded(squares, unreadable, next(failures, None))
