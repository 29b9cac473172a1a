"""A cache as the page in the browser looks at it: keys found, teachers side by side, near tokens.

Comes in: names, keys and numbers that somebody typed; no path ever does. Goes out: plain values
for ``panels``. A cache that is still being built is opened again when it is asked for more.

Legend: N tokens, K neighbours, G grid side, H heads.
"""

import random
import threading
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

NUM_NEAREST = 6
_MOST_FOUND = 50


@dataclass(frozen=True)
class TokenPanel:
    """One teacher's side of the page.

    Attributes:
        look: picture, colours and attention.
        heads: how many heads of attention are stored.
        head: whose attention the look shows; None for the mean of them.
        nearest_NK: of each token its nearest ones of the same image, itself left out; None where
            there are no features.
        cosine_NK: how near, cosine of the standardised tokens.
        shard_error: mean and largest error in the seal of the row's Zarr shard.
    """

    look: FeatureView
    heads: int
    head: int | None
    nearest_NK: npt.NDArray[np.int64] | None
    cosine_NK: npt.NDArray[np.float32] | None
    shard_error: tuple[float, float] | None


class Browser:
    """Answers the page's questions about one cache.

    Args:
        url: the cache.
        corpus: its images; without them there are no pictures.

    Raises:
        CacheError: there is no cache.
    """

    def __init__(self, url: str, corpus: Corpus | None = None) -> None:
        self._url, self.corpus = url, corpus
        self._lock = threading.Lock()
        self._looker = FeatureViewer(open_cache(url), corpus)

    @property
    def cache(self) -> FeatureCache:
        """The cache as it was opened last."""
        return self._looker.cache

    def refresh(self) -> None:
        """Open the cache again unless all of it was there."""
        with self._lock:
            cache = self.cache
            if cache.teachers and all(cache[name].is_complete for name in cache.teachers):
                return
        self.reopen()

    def reopen(self) -> None:
        """Open the cache again; colours that were settled stay."""
        with self._lock:
            self._looker = FeatureViewer(
                open_cache(self._url), self.corpus, known=self._looker.bases
            )

    def search(self, text: str) -> list[str]:
        """Return names that hold ``text``, and keys that begin with it; the first 50."""
        names, keys, wanted = self.cache.catalog.names["name"], self.cache.keys, text.strip()
        found: list[str] = (
            names.filter(pc.match_substring(names, wanted)).slice(0, _MOST_FOUND).to_pylist()
        )
        found += keys.filter(pc.starts_with(keys, wanted)).slice(0, _MOST_FOUND).to_pylist()
        return found[:_MOST_FOUND]

    def draw(self) -> str:
        """Return the key of some image.

        Raises:
            CacheError: there is none.
        """
        keys = self.cache.keys
        if not len(keys):
            raise CacheError(f"{self.cache.url} holds no image.")
        return str(keys[random.randrange(len(keys))].as_py())

    def panels(
        self, name: str, teachers: Sequence[str], view: int = 0, head: int | None = None
    ) -> list[TokenPanel]:
        """Return what each teacher says of a view of an image.

        Args:
            name: key or name of the image.
            teachers: whose panels.
            view: 0 is the whole image.
            head: whose attention; the mean of the heads unless given, and for a teacher with fewer.

        Raises:
            UnknownKeyError: the cache holds no such image, or no such view.
            CacheError: it holds no such teacher.
        """
        self.refresh()
        looker = self._looker
        row = int(looker.cache.rows([name.strip()], view)[0])
        return [self._panel(looker, teacher, row, view, head) for teacher in teachers]

    def _panel(
        self, looker: FeatureViewer, teacher: str, row: int, view: int, head: int | None
    ) -> TokenPanel:
        store, look = looker.cache[teacher], looker.look_at(teacher, row, view)
        seal = store.seals.get(row // store.layout.rows_per_shard)
        error = (seal.error.mean, seal.error.max) if seal and seal.error.num_tokens else None
        if look.reason is not None:
            return TokenPanel(look, 0, None, None, None, error)
        targets = store.read([row])
        attention, heads = targets.cls_attention_BHN, 0
        if attention is not None:
            heads = attention.shape[1]
            head = head if head is not None and head < heads else None
            if head is not None:
                side = store.grid
                chosen = attention[0, head].view(side, side).numpy()
                look = replace(look, attention_GG=np.asarray(chosen, np.float32))
        tokens_ND = torch.nn.functional.normalize(targets.standardised_BND[0], dim=-1)
        cosine_NN = tokens_ND @ tokens_ND.T
        cosine_NN.fill_diagonal_(-2)
        best = cosine_NN.topk(min(NUM_NEAREST, len(cosine_NN) - 1), dim=-1)
        return TokenPanel(
            look,
            heads,
            head,
            best.indices.numpy(),
            np.asarray(best.values.numpy(), np.float32),
            error,
        )
