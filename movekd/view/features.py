"""What there is to see of one view of an image: each teacher's tokens, attention and error.

Comes in: a cache, and if given the corpus of its images and the teachers to hold it against. Goes
out: one ``FeatureView`` a teacher, which ``sheet`` draws and ``page`` shows.

Legend: B batch, N tokens, G grid side, D channels, H heads, S side of the square.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from movekd.view.pca import ColourBasis, basis_of

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FeatureView:
    """One teacher's features of one view of an image.

    Attributes:
        teacher: its name.
        spec: how it was built.
        grid: side G of the stored grid.
        reason: why there are no features: not built yet, or the image could not be read. Then all
            of the following are None, the picture aside.
        picture_SSC: the view as the teacher saw it, uint8; None without a corpus.
        colours_GGC: the tokens in the teacher's colour basis, 0..1.
        attention_GG: of [CLS] over the patches, the mean of the heads; None where not stored.
        error_GG: relative error of each decoded token against the teacher run now; None unless
            asked for.
        sealed_error: mean relative error of the codec, as the seals of the teacher say.
    """

    teacher: str
    spec: CacheSpec
    grid: int
    reason: str | None
    picture_SSC: Pixels | None
    colours_GGC: npt.NDArray[np.float32] | None
    attention_GG: npt.NDArray[np.float32] | None
    error_GG: npt.NDArray[np.float32] | None
    sealed_error: float | None


class FeatureViewer:
    """Looks at images of a cache; colour bases and teachers are kept between images.

    Args:
        cache: the features.
        corpus: the images that the cache was built from; without them there are no pictures.
        teachers: whose features; all unless given.
        exact: spec of each teacher to run for the error map, none unless given.
        options: where those run.
        known: bases of teachers that were fitted before, and stay.

    Attributes:
        cache: the features.
        corpus: the images.
        teachers: whose features.
        bases: the colour basis of each teacher that was looked at.

    Raises:
        CacheError: the cache holds no such teacher, or the weights are others.
    """

    def __init__(
        self,
        cache: FeatureCache,
        corpus: Corpus | None = None,
        teachers: Sequence[str] | None = None,
        exact: Mapping[str, CacheSpec] | None = None,
        options: BuildOptions | None = None,
        known: Mapping[str, ColourBasis] | None = None,
    ) -> None:
        self.cache, self.corpus = cache, corpus
        self.bases = dict(known or {})
        self.teachers = tuple(teachers or cache.teachers)
        for name in self.teachers:
            cache[name]  # says which there are
        self._exact, self._options = exact or {}, options
        self._teacher = remember(self._load)

    def look(self, key: str, view: int = 0) -> list[FeatureView]:
        """Return what there is to see of a view of an image, a teacher each.

        Raises:
            UnknownKeyError: the cache holds no such name or key, or view.
        """
        row = int(self.cache.rows([key], view)[0])
        return [self.look_at(name, row, view) for name in self.teachers]

    def key_of(self, name: str) -> str:
        """Return the key of a name or key that the cache holds."""
        return _key_at(self.cache.catalog, int(self.cache.rows([name])[0]))

    def look_at(self, teacher: str, row: int, view: int) -> FeatureView:
        """Return what one teacher says in a row, which holds that view of an image."""
        store, key = self.cache[teacher], _key_at(self.cache.catalog, row)
        sums = store.sums
        tokens = sums.num_tokens_S.sum()
        sealed = float((sums.error_mean_S * sums.num_tokens_S).sum() / tokens) if tokens else None
        picture, reason = self._picture(store.spec, key, view), None
        if row // store.layout.rows_per_shard in store.missing_shards:
            reason = "not built yet"
        elif row in store.skipped:
            reason = store.skipped[row]
        if reason is not None:
            return FeatureView(
                store.teacher, store.spec, store.grid, reason, picture, None, None, None, sealed
            )
        targets, side = store.read([row]), store.grid
        attention = targets.cls_attention_BHN
        return FeatureView(
            teacher=store.teacher,
            spec=store.spec,
            grid=side,
            reason=None,
            picture_SSC=picture,
            colours_GGC=self._basis(store)
            .colours(targets.standardised_BND[0])
            .reshape(side, side, 3),
            attention_GG=None
            if attention is None
            else np.asarray(attention[0].mean(0).view(side, side).numpy(), np.float32),
            error_GG=self._error(store, key, row, view) if store.teacher in self._exact else None,
            sealed_error=sealed,
        )

    def _basis(self, store: TeacherCache) -> ColourBasis:
        if store.teacher not in self.bases:
            self.bases[store.teacher] = basis_of(store, self.cache.catalog)
        return self.bases[store.teacher]

    def _picture(self, spec: CacheSpec, key: str, view: int) -> Pixels | None:
        """Return the square that the teacher saw, its padding too."""
        if self.corpus is None:
            return None
        transform = image_transform(spec, self.cache.geometry)
        try:
            image = decode_image(self.corpus.read_image(self._place(key)))
            return ImageViews(transform, image).square(view).levels_HWC
        except UnreadableImageError:
            return None  # the reason stands in the seal

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
