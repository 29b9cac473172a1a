"""Read images and targets of several sources by one number each, counted over all of them.

``JoinedCorpora`` stands for a corpus and ``JoinedCaches`` for a cache where a collator reads them.
A batch may hold rows of several caches. Where these share channel statistics and codec, their
stored bytes become one batch; otherwise ``mixed_targets`` brings them onto the first cache's scale.

Legend: B samples of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from movekd.cache.reader import Rows, TeacherCache
from movekd.cache.targets import TeacherTargets
from movekd.corpus.index import Corpus
from movekd.train.mixed_targets import MixedTargets
from movekd.train.sources import Source


class JoinedCorpora:
    """The images of several corpora."""

    def __init__(self, sources: Sequence[Source]) -> None:
        found = {source.image_start: source.corpus for source in sources}
        self._starts, self._corpora = list(found), list(found.values())

    def read_image(self, image: int) -> bytes:
        """Return the bytes of an image's file."""
        corpus, row = self._find(image)
        return corpus.read_image(row)

    def describe(self, image: int) -> str:
        """Return an image's key and its folder, for messages."""
        corpus, row = self._find(image)
        return corpus.describe(row)

    def _find(self, image: int) -> tuple[Corpus, int]:
        number = int(np.searchsorted(self._starts, image, "right")) - 1
        return self._corpora[number], image - self._starts[number]


class JoinedCaches:
    """The targets of several caches: ``caches[teacher].read(rows)``."""

    def __init__(self, sources: Sequence[Source]) -> None:
        found = {s.row_start: s.cache for s in sources if s.cache is not None}
        self._starts, self._caches = list(found), list(found.values())

    def __getitem__(self, teacher: str) -> "JoinedTeacher":
        return JoinedTeacher([cache[teacher] for cache in self._caches], self._starts)


class JoinedTeacher:
    """One teacher's targets in several caches."""

    def __init__(self, teachers: Sequence[TeacherCache], starts: Sequence[int]) -> None:
        self._teachers, self._starts = teachers, starts

    def read(self, rows: Rows) -> TeacherTargets | MixedTargets:
        """Return the features of some rows, in the order asked, numbered over all caches."""
        asked = np.asarray(rows, np.int64)
        of_B = np.searchsorted(self._starts, asked, "right") - 1
        parts, places = [], []
        for number in np.unique(of_B).tolist():
            at = np.flatnonzero(of_B == number)
            parts.append(self._teachers[number].read(asked[at] - self._starts[number]))
            places.append(torch.from_numpy(at))
        first = self._teachers[0]
        if all(self.is_alike(number) for number in np.unique(of_B).tolist()):
            return _join(parts, places)
        return MixedTargets(tuple(parts), tuple(places), first.stats)

    def is_alike(self, number: int) -> bool:
        """Return whether a cache's stored bytes mean the same as the first one's."""
        first, other = self._teachers[0], self._teachers[number]
        a, b = first.group_arrays, other.group_arrays
        return (
            first.codec_name == other.codec_name
            and a.keys() == b.keys()
            and all(np.array_equal(a[name], b[name]) for name in a)
        )


def _join(parts: Sequence[TeacherTargets], places: Sequence[torch.Tensor]) -> TeacherTargets:
    """Return the rows of several caches with one codec and one calibration as one batch."""
    if len(parts) == 1:
        return parts[0]
    order = torch.argsort(torch.cat(list(places)))
    stored = {
        name: torch.cat([part.stored[name] for part in parts])[order] for name in parts[0].stored
    }
    return TeacherTargets(stored, parts[0].stats, parts[0].codec)
