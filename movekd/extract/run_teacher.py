"""A teacher run on chosen images, for what is compared with a cache instead of written to one.

Comes in: a loaded teacher and positions in a corpus. Goes out: its features, batch by batch. Used
by ``fidelity`` (what would a codec lose?) and ``recompute`` (is what is stored right?).

Legend: B batch, N tokens, D channels, H heads.
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from movekd.cache.grid import resize_attention, resize_tokens
from movekd.cache.layout import grid_side
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import Geometry
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions, Progress
from movekd.teachers import Teacher


@dataclass(frozen=True)
class LiveFeatures:
    """What a teacher says about a batch of images; float32, on the teacher's device.

    Attributes:
        images: positions in the corpus.
        views: which view of each.
        tokens_BND: patch tokens, in the teacher's units.
        cls_BD: [CLS] embedding, None unless the spec asks for it.
        cls_attention_BHN: attention of [CLS], None unless asked for.
    """

    images: list[int]
    views: list[int]
    tokens_BND: Tensor
    cls_BD: Tensor | None
    cls_attention_BHN: Tensor | None

    @property
    def grid(self) -> int:
        """Side of the grid."""
        return grid_side(self.tokens_BND.shape[1])

    def resize_output(self, side: int) -> "LiveFeatures":
        """Return the features as a build with this grid would encode them."""
        attention = self.cls_attention_BHN
        return replace(
            self,
            tokens_BND=resize_tokens(self.tokens_BND, side),
            cls_attention_BHN=None if attention is None else resize_attention(attention, side),
        )


def live_features(
    teacher: Teacher,
    corpus: Corpus,
    geometry: Geometry,
    images: npt.NDArray[np.int64],
    views: npt.NDArray[np.int16],
    options: BuildOptions,
    unreadable: MutableMapping[int, str],
    progress: Progress,
    what: str,
) -> Iterator[LiveFeatures]:
    """Yield a teacher's features of some views of images, in order.

    Args:
        teacher: what runs.
        corpus: where the images are.
        geometry: how they become squares, unless the teacher's spec has its own.
        images: positions in the corpus.
        views: which view of each.
        options: device, dtype, batch size and decoding processes.
        unreadable: takes the images that cannot be decoded, position -> reason; left out.
        progress: called after each batch.
        what: what to tell ``progress``.
    """
    size = options.images_a_pass
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
        kept = [place for place in range(len(batch.images)) if place not in batch.unreadable]
        unreadable.update({batch.images[at]: reason for at, reason in batch.unreadable.items()})
        if kept:
            output = teacher.forward(batch.pixels(options.device, options.dtype))
            cls, attention = output.cls_BD, output.cls_attention_BHN
            # Picking copies them, which makes them usable in a graph: forward's are not.
            yield LiveFeatures(
                [batch.images[place] for place in kept],
                [of_batch[place] for place in kept],
                output.tokens_BND[kept].float(),
                None if cls is None else cls[kept].float(),
                None if attention is None else attention[kept].float(),
            )
        done += len(batch.images)
        progress(what, done, len(images))
