"""Answer the web page's questions about a cache: search, features, nearest tokens.

Input: names, keys and numbers from the user, never a path. Output: plain values for ``html``. An
incomplete cache is opened again for each image.

Legend: N tokens, K neighbours, G grid side, H heads.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from movekd.cache.reader import FeatureCache, open_cache
from movekd.corpus.index import Corpus
from movekd.errors import CacheError
from movekd.view.features import FeatureView, FeatureViewer
from movekd.view.thumbnails import Thumbnails, first_name, read_thumbnails

NUM_NEAREST = 6
_MOST_FOUND = 50


@dataclass(frozen=True)
class TokenPanel:
    """One teacher's panel of the page.

    Attributes:
        features: picture, colours and attention.
        heads: number of stored heads of attention; 1 if their mean is stored.
        head: head whose attention ``features`` holds; None for the mean of all heads.
        nearest_NK: for each token the nearest other tokens of the image; None without features.
        cosine_NK: their cosines, of standardised tokens.
        shard_error: mean and largest error in the seal of the row's Zarr shard.
    """

    features: FeatureView
    heads: int
    head: int | None
    nearest_NK: npt.NDArray[np.int64] | None
    cosine_NK: npt.NDArray[np.float32] | None
    shard_error: tuple[float, float] | None


class Browser:
    """Answers the page's questions about one cache.

    Args:
        url: the cache.
        corpus: its images; needed for pictures.

    Raises:
        CacheError: the cache does not exist.
    """

    def __init__(self, url: str, corpus: Corpus | None = None) -> None:
        self._url, self.corpus = url, corpus
        self._viewer = FeatureViewer(open_cache(url), corpus)

    @property
    def cache(self) -> FeatureCache:
        """The cache, as last opened."""
        return self._viewer.cache

    def reopen(self) -> None:
        """Open the cache again; keep the fitted PCA bases."""
        bases = self._viewer.bases
        self._viewer = FeatureViewer(open_cache(self._url), self.corpus, known=bases)

    def thumbnails(self, page: int) -> Thumbnails:
        """Return a page of thumbnails, from 1; a number outside gives the nearest page."""
        return read_thumbnails(self.cache.catalog, self.corpus, page)

    def first_name(self) -> str:
        """Return the name of the image that is shown first; empty for an empty cache."""
        return first_name(self.cache.catalog)

    def search(self, text: str) -> list[str]:
        """Return the first 50 names that contain ``text`` and keys that start with it."""
        names, keys, wanted = self.cache.catalog.names["name"], self.cache.keys, text.strip()
        found: list[str] = (
            names.filter(pc.match_substring(names, wanted)).slice(0, _MOST_FOUND).to_pylist()
        )
        found += keys.filter(pc.starts_with(keys, wanted)).slice(0, _MOST_FOUND).to_pylist()
        return found[:_MOST_FOUND]

    def draw(self) -> str:
        """Return the key of a random image.

        Raises:
            CacheError: the cache is empty.
        """
        keys = self.cache.keys
        if not len(keys):
            raise CacheError(f"{self.cache.url} holds no image.")
        return str(keys[random.randrange(len(keys))].as_py())

    def panels(
        self, name: str, teachers: Sequence[str], view: int = 0, head: int | None = None
    ) -> list[TokenPanel]:
        """Return each teacher's panel for a view of an image.

        Args:
            name: key or name of the image.
            teachers: names of the teachers.
            view: 0 is the whole image.
            head: head of attention. Default: the mean; also for a teacher with fewer heads.

        Raises:
            UnknownKeyError: the cache does not hold the image or the view.
            CacheError: the cache does not hold a teacher.
        """
        cache = self.cache
        if not cache.teachers or not all(cache[name].is_complete for name in cache.teachers):
            self.reopen()
        viewer = self._viewer
        row = int(viewer.cache.rows([name.strip()], view)[0])
        return [self._panel(viewer, teacher, row, view, head) for teacher in teachers]

    def _panel(
        self, viewer: FeatureViewer, teacher: str, row: int, view: int, head: int | None
    ) -> TokenPanel:
        store, features = viewer.cache[teacher], viewer.show_row(teacher, row, view)
        seal = store.seals.get(row // store.layout.rows_per_shard)
        error = (seal.error.mean, seal.error.max) if seal and seal.error.num_tokens else None
        if features.reason is not None:
            return TokenPanel(features, 0, None, None, None, error)
        targets = store.read([row])
        attention, heads = targets.cls_attention_BHN, 0
        if attention is not None:
            heads = attention.shape[1]
            head = head if head is not None and head < heads > 1 else None
            if head is not None:
                chosen = attention[0, head].view(store.grid, store.grid).numpy()
                features = replace(features, attention_GG=np.asarray(chosen, np.float32))
        tokens_ND = torch.nn.functional.normalize(targets.standardised_BND[0], dim=-1)
        cosine_NN = tokens_ND @ tokens_ND.T
        cosine_NN.fill_diagonal_(-2)
        best = cosine_NN.topk(min(NUM_NEAREST, len(cosine_NN) - 1), dim=-1)
        cosine_NK = np.asarray(best.values.numpy(), np.float32)
        return TokenPanel(features, heads, head, best.indices.numpy(), cosine_NK, error)
