"""Read a teacher's features of labelled images from a cache, without loading the teacher.

Input: ``cache:DIR#TEACHER``. Output: a ``ProbedModel``. A cache knows an image by the SHA-256 of
its file, so it does not matter where the file lies or what it is called.

Legend: B images.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from movekd.cache.reader import FeatureCache, open_cache
from movekd.cache.targets import TeacherTargets
from movekd.errors import ConfigError, shorten

PREFIX = "cache:"


class CachedTeacher:
    """One teacher of a cache: its tokens as they were stored, decoded, in the teacher's units.

    Attributes:
        identity: None, as its features are kept already.
        geometry: how images became square for this teacher.
        cache: the cache.
        teacher: name of the teacher.

    Raises:
        CacheError: the cache does not hold the teacher, or holds features of other images.
    """

    identity: str | None = None

    def __init__(self, cache: FeatureCache, teacher: str) -> None:
        self.cache, self.teacher = cache, teacher
        self._store = cache[teacher]
        self._store.require_images(cache.catalog)
        self.geometry = self._store.spec.geometry or cache.geometry

    def is_missing(self, keys: pa.Array) -> npt.NDArray[np.bool_]:
        """Return which images have no features here."""
        rows, shards = self.cache.find_rows(keys), self._store.missing_shards
        return (
            (rows < 0)
            | np.isin(rows // self._store.layout.rows_per_shard, shards)
            | np.isin(rows, list(self._store.skipped))
        )

    def missing(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the images that have no features here: key -> why."""
        asked = pa.array(keys, pa.string())
        found = asked.filter(pa.array(self.is_missing(asked))).to_pylist()
        return dict(zip(found, map(self._reason, self.cache.find_rows(found)), strict=True))

    def _reason(self, row: int) -> str:
        where = f"{self.cache.url}#{self.teacher}"
        if row < 0:
            return f"{self.cache.url} does not hold it"
        if (why := self._store.skipped.get(int(row))) is not None:
            return f"{where} has no features of it: {why}"
        return f"{where} is not built that far"

    def targets(self, keys: Sequence[str]) -> TeacherTargets:
        """Return the stored features of images that are not ``missing``."""
        return self._store.read(self.cache.find_rows(keys))

    def encode(self, keys: Sequence[str], contents: Iterable[bytes]) -> TeacherTargets:
        """Return the stored features of images that are not ``missing``; reads no image."""
        return self.targets(keys)


def open_cached_teacher(model: str) -> CachedTeacher:
    """Return the teacher that ``cache:DIR#TEACHER`` names.

    Raises:
        ConfigError: it names no teacher; lists those of the cache.
        CacheError: no cache lies there, or it has no such teacher.
    """
    place, _, teacher = model.removeprefix(PREFIX).rpartition("#")
    if not place:
        cache = open_cache(teacher)
        raise ConfigError(
            f"{shorten(model)} names no teacher; expected {PREFIX}DIR#TEACHER with one of "
            f"{', '.join(cache.teachers) or 'none (nothing is built yet)'}."
        )
    return CachedTeacher(open_cache(place), teacher)
