"""Run a teacher on chosen images and return its features without storing them.

Input: a loaded teacher and positions in a corpus. Output: its features, batch by batch.
``extract.calibrate``, ``analysis.fidelity``, ``analysis.verify_features`` and ``view.features`` use
it.

Legend: B batch, N tokens, D channels, H heads.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from movekd.cache.layout import grid_side
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import Geometry
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions, Progress
from movekd.teachers import Teacher, TeacherOutput


@dataclass(frozen=True)
class LiveFeatures(TeacherOutput):
    """A teacher's features of a batch of images.

    Attributes:
        images: positions in the corpus.
        views: which view of each image.
    """

    images: Sequence[int] = ()
    views: Sequence[int] = ()

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return grid_side(self.tokens_BND.shape[1])


def live_features(
    teacher: Teacher,
    corpus: Corpus,
    geometry: Geometry,
    images: npt.NDArray[np.int64],
    views: npt.NDArray[np.int16],
    options: BuildOptions,
    unreadable: MutableMapping[int, str],
    progress: Progress,
    label: str,
) -> Iterator[LiveFeatures]:
    """Yield a teacher's features of some views of images, in order.

    Args:
        teacher: the teacher.
        corpus: where the images are.
        geometry: how images become squares; the teacher's spec may have its own.
        images: positions in the corpus.
        views: which view of each image.
        options: device, dtype, batch size and decoding processes.
        unreadable: receives the images that cannot be decoded, position -> reason. They are left
            out of the features.
        progress: called after each batch.
        label: the label for ``progress``.
    """
    size = options.forward_batch_size
    starts = range(0, len(images), size)
    views_of = [views[start : start + size].tolist() for start in starts]
    batches = pixel_batches(
        corpus,
        image_transform(teacher.spec, geometry),
        [images[start : start + size].tolist() for start in starts],
        views=views_of,
        num_workers=options.num_workers,
        pin_memory=options.device.startswith("cuda"),
    )
    done = 0
    for batch, of_batch in zip(batches, views_of, strict=True):
        kept = [index for index in range(len(batch.images)) if index not in batch.unreadable]
        unreadable.update(
            {batch.images[index]: reason for index, reason in batch.unreadable.items()}
        )
        if kept:
            output = teacher.forward(batch.pixels(options.device, options.dtype))
            # Indexing copies the features: autograd refuses tensors of the inference mode.
            output = output.map(lambda tensor: tensor[kept].float())  # noqa: B023 - called at once
            yield LiveFeatures(
                **vars(output),
                images=[batch.images[index] for index in kept],
                views=[of_batch[index] for index in kept],
            )
        done += len(batch.images)
        progress(label, done, len(images))
