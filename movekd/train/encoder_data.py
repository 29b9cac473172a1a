"""Read the data of stage distill: every view of a corpus with its targets, without text.

A sample is one view of one image. The DataLoader's workers read image and targets when they collate
a batch. Images that a teacher could not read are left out.

Legend: I samples of a batch, C H W the pixels of a view.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from movekd.cache.reader import FeatureCache
from movekd.corpus.anyres import Views, list_views
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import ImageTransform
from movekd.errors import CacheError, UnreadableImageError
from movekd.train.joined_inputs import JoinedCaches, JoinedCorpora
from movekd.train.sampler import EMPTY


class EncoderSample(NamedTuple):
    """One view of an image and the position of its targets."""

    key: str
    image: int
    """Position in the corpus."""
    view: int
    """0 is the whole image."""
    row: int
    """Row of the cache."""

    def shifted(self, image_start: int, row_start: int) -> "EncoderSample":
        """Return the same sample with its image and its row counted from other starts."""
        return self._replace(image=self.image + image_start, row=self.row + row_start)


class EncoderDataset(Dataset[EncoderSample]):
    """The images of a corpus for which every teacher has features.

    Args:
        corpus: the images.
        cache: holds the targets of all of them.
        teachers: the teachers to read targets of.
        views: anyres: every tile is a sample, too; the cache must hold the tiles.
        chosen: which images of the corpus to take. Default: all.

    Raises:
        UnknownKeyError: an image is missing from the cache; names some.
        CacheError: no image is left, or a teacher was sealed for other images.
    """

    def __init__(
        self,
        corpus: Corpus,
        cache: FeatureCache,
        teachers: Sequence[str],
        views: Views = "base",
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        self._keys = corpus.index["key"]
        base_rows = cache.rows(self._keys.combine_chunks())
        images, numbers = list_views(corpus.index["width"], corpus.index["height"], views)
        rows = base_rows[images] + numbers  # the views of an image are consecutive rows
        skipped: set[int] = set()
        for teacher in teachers:
            cache[teacher].require_images(cache.catalog)
            skipped |= cache[teacher].skipped.keys()
        is_read = ~np.isin(rows, list(skipped))
        if chosen is not None:
            is_read &= chosen[images]
        self._images, self._views, self._rows = images[is_read], numbers[is_read], rows[is_read]
        if not len(self._rows):
            num_asked = len(corpus) if chosen is None else int(chosen.sum())
            raise CacheError(
                f"of the {num_asked} images of {corpus.data_dir} none has features of all of "
                f"{', '.join(teachers)} in {cache.url}; expected some. Pack images that can be "
                "read, and build their cache."
            )

    @property
    def images(self) -> NDArray[np.int64]:
        """Position in the corpus of the image of each sample."""
        return self._images

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> EncoderSample:
        if position == EMPTY:
            return EncoderSample("(filled up)", EMPTY, 0, 0)
        image = int(self._images[position])
        view, row = int(self._views[position]), int(self._rows[position])
        return EncoderSample(self._keys[image].as_py(), image, view, row)


@dataclass(frozen=True)
class EncoderCollator:
    """Turn samples into one batch of model input, with targets as the cache stores them."""

    corpus: Corpus | JoinedCorpora
    transform: ImageTransform
    cache: FeatureCache | JoinedCaches
    teachers: tuple[str, ...]

    def __call__(self, samples: Sequence[EncoderSample]) -> dict[str, Any]:
        """Return the keyword arguments of ``DistillModel.forward``.

        Keys: keys (for error messages); pixel_values float32 (I, C, H, W); targets: teacher ->
        TeacherTargets of I rows. The last two are None where every sample is empty.
        """
        samples = [sample for sample in samples if sample.image != EMPTY]
        if not samples:
            return {"keys": [], "pixel_values": None, "targets": None}
        rows = [sample.row for sample in samples]
        pixels = []
        for sample in samples:
            with name_bad_image(self.corpus, sample.image):
                pixels.append(self.transform(self.corpus.read_image(sample.image), sample.view))
        return {
            "keys": [sample.key for sample in samples],
            "pixel_values": torch.from_numpy(np.stack(pixels)),
            "targets": {teacher: self.cache[teacher].read(rows) for teacher in self.teachers},
        }


@contextmanager
def name_bad_image(corpus: Corpus | JoinedCorpora, image: int) -> Iterator[None]:
    """Add the image's key and its corpus to the error of an image that cannot be decoded."""
    try:
        yield
    except UnreadableImageError as error:
        raise UnreadableImageError(f"image {corpus.describe(image)}: {error}") from None
