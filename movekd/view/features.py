"""Collect what a cache holds of one view of an image: each teacher's tokens, attention and error.

Input: a cache; optionally the corpus of its images, and teachers to run for the error. Output: one
``FeatureView`` per teacher, for ``contact_sheet`` and ``gradio_app``.

Legend: B batch, N tokens, G grid side, D channels, H heads, S side of the square.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as remember

import numpy as np
import numpy.typing as npt
import torch

from movekd.cache.catalog import Catalog
from movekd.cache.reader import FeatureCache, TeacherCache
from movekd.cache.spec import CacheSpec
from movekd.corpus.decode import decode_image
from movekd.corpus.index import Corpus, find_rows
from movekd.corpus.transforms import ImageViews
from movekd.errors import CacheError, CorpusError, UnreadableImageError
from movekd.extract.image_loader import image_transform
from movekd.extract.options import BuildOptions
from movekd.extract.run_teacher import live_features
from movekd.teachers import Teacher, load_teacher
from movekd.view.pca import PcaBasis, fit_teacher_basis

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FeatureView:
    """One teacher's features of one view of an image.

    Attributes:
        teacher: name of the teacher.
        spec: its spec.
        grid: side G of the stored grid.
        reason: why the features are missing (not built yet, or an unreadable image), or None. If
            given, only ``picture_SSC`` and ``sealed_error`` can have values below.
        picture_SSC: the input of the teacher, uint8; None without a corpus.
        sealed_error: mean relative error of the codec, from the seals of the teacher.
        colours_GGC: the tokens in the teacher's PCA basis, 0..1.
        attention_GG: attention of [CLS] over the patches, mean of the heads; None if not stored.
        error_GG: relative error of each decoded token against the teacher run now; None if the
            viewer has no spec to run.
    """

    teacher: str
    spec: CacheSpec
    grid: int
    reason: str | None
    picture_SSC: Pixels | None
    sealed_error: float | None
    colours_GGC: npt.NDArray[np.float32] | None = None
    attention_GG: npt.NDArray[np.float32] | None = None
    error_GG: npt.NDArray[np.float32] | None = None


class FeatureViewer:
    """Shows images of a cache; keeps PCA bases and loaded teachers between images.

    Args:
        cache: the features.
        corpus: the images that the cache was built from; needed for pictures.
        teachers: names of the teachers to show. Default: all.
        exact: spec of each teacher to run for the error map. Default: none.
        options: how those teachers run.
        known: bases that were fitted before.

    Attributes:
        bases: PCA basis of each teacher that was shown.

    Raises:
        CacheError: the cache does not hold a teacher, or was built from other weights.
    """

    def __init__(
        self,
        cache: FeatureCache,
        corpus: Corpus | None = None,
        teachers: Sequence[str] | None = None,
        exact: Mapping[str, CacheSpec] | None = None,
        options: BuildOptions | None = None,
        known: Mapping[str, PcaBasis] | None = None,
    ) -> None:
        self.cache, self.corpus = cache, corpus
        self.bases = dict(known or {})
        self.teachers = tuple(teachers or cache.teachers)
        for name in self.teachers:
            cache[name]  # raises for an unknown name
        self._exact, self._options = exact or {}, options
        self._teacher = remember(self._load)

    def show(self, key: str, view: int = 0) -> list[FeatureView]:
        """Return the features of a view of an image, one item per teacher.

        Raises:
            UnknownKeyError: the cache does not hold the name, key or view.
        """
        row = int(self.cache.rows([key], view)[0])
        return [self.show_row(name, row, view) for name in self.teachers]

    def key_of(self, name: str) -> str:
        """Return the key of an image, given its name or key."""
        return _key_at(self.cache.catalog, int(self.cache.rows([name])[0]))

    def show_row(self, teacher: str, row: int, view: int) -> FeatureView:
        """Return one teacher's features in a row, which holds that view of an image."""
        store, key = self.cache[teacher], _key_at(self.cache.catalog, row)
        sums = store.sums
        tokens = sums.num_tokens_S.sum()
        sealed = float((sums.error_mean_S * sums.num_tokens_S).sum() / tokens) if tokens else None
        picture, reason = self._picture(store.spec, key, view), None
        if row // store.layout.rows_per_shard in store.missing_shards:
            reason = "not built yet"
        elif row in store.skipped:
            reason = store.skipped[row]
        spec = store.spec.with_changes(codec=store.codec_name)
        found = FeatureView(teacher, spec, store.grid, reason, picture, sealed)
        if reason is not None:
            return found
        targets, side = store.read([row]), store.grid
        if teacher not in self.bases:
            self.bases[teacher] = fit_teacher_basis(store, self.cache.catalog)
        colours_NC = self.bases[teacher].colours(targets.standardised_BND[0])
        found = replace(found, colours_GGC=colours_NC.reshape(side, side, 3))
        if targets.cls_attention_BHN is not None:
            mean_GG = targets.cls_attention_BHN[0].mean(0).view(side, side)
            found = replace(found, attention_GG=np.asarray(mean_GG.numpy(), np.float32))
        if teacher in self._exact:
            found = replace(found, error_GG=self._error(store, key, row, view))
        return found

    def _picture(self, spec: CacheSpec, key: str, view: int) -> Pixels | None:
        """Return the input of the teacher, padding included."""
        if self.corpus is None:
            return None
        try:
            image = decode_image(self.corpus.read_image(self._place(key)))
            return (
                ImageViews(image_transform(spec, self.cache.geometry), image)
                .square(view)
                .levels_HWC
            )
        except UnreadableImageError:
            return None  # the seal holds the reason

    def _place(self, key: str) -> int:
        assert self.corpus is not None
        place = int(find_rows([key], self.corpus.index, self.corpus.names)[0])
        if place < 0:
            raise CorpusError(
                f"{self.corpus.data_dir} holds no image with key {key}; give the --shards that the "
                f"cache {self.cache.url} was built from."
            )
        return place

    def _error(self, store: TeacherCache, key: str, row: int, view: int) -> npt.NDArray[np.float32]:
        """Return ||decoded - exact|| / ||exact|| of each token, in standardised channels."""
        assert self.corpus is not None
        assert self._options is not None
        live = next(
            live_features(
                self._teacher(store.teacher),
                self.corpus,
                self.cache.geometry,
                np.array([self._place(key)], np.int64),
                np.array([view], np.int16),
                self._options,
                {},
                lambda what, done, total: None,
                store.teacher,
            )
        )
        exact_ND = store.stats.standardise(live.resize(store.grid).tokens_BND.cpu())[0]
        decoded_ND = store.read([row]).standardised_BND[0]
        error_N = (decoded_ND - exact_ND).norm(dim=-1) / exact_ND.norm(dim=-1).clamp(min=1e-12)
        return np.asarray(error_N.view(store.grid, store.grid).numpy(), np.float32)

    def _load(self, name: str) -> Teacher:
        assert self._options is not None
        store = self.cache[name]
        dtype = getattr(torch, store.calibration.dtype)
        teacher = load_teacher(self._exact[name], self._options.device, dtype)
        if teacher.weights_sha256 != store.calibration.weights_sha256:
            raise CacheError(
                f"the weights of '{name}' have SHA-256 {teacher.weights_sha256[:16]}..., "
                f"{self.cache.url} was built with {store.calibration.weights_sha256[:16]}...; give "
                "those with --weights, or leave --exact out."
            )
        return teacher


def _key_at(catalog: Catalog, row: int) -> str:
    place = int(np.searchsorted(catalog.rows, row))
    return str(catalog.index.slice(place, 1, ["key"])["key"][0].as_py())
