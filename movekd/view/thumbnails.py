"""Make the thumbnails of one page of names: the grid with which the web page opens.

Input: an open cache, its corpus and the number of a page. Output: ``Thumbnails`` for ``html``. Only
the images of that page are read and decoded, one after the other, however many a cache has.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from movekd.cache.catalog import Catalog
from movekd.corpus.decode import decode_image
from movekd.corpus.index import Corpus
from movekd.errors import MovekdError

NUM_SHOWN = 24
_SIDE = 128  # pixels
_QUALITY = 80


@dataclass(frozen=True)
class Thumbnail:
    """One image of the grid.

    Attributes:
        name: name of the image.
        jpeg: its picture, at most 128 pixels wide and high; None without a corpus or if damaged.
        label: what stands in place of the picture, or an empty string.
        problem: the sentence about it, or an empty string.
    """

    name: str
    jpeg: bytes | None
    label: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Thumbnails:
    """One page of the grid.

    Attributes:
        page: its number, from 1.
        num_pages: number of pages, at least 1.
        num_names: names of the cache. An image with several names is shown under each.
        shown: the images.
    """

    page: int
    num_pages: int
    num_names: int
    shown: Sequence[Thumbnail]


def first_name(catalog: Catalog) -> str:
    """Return the first name of a cache, or an empty string."""
    names = catalog.names.slice(0, 1, ["name"])["name"]
    return str(names[0].as_py()) if len(names) else ""


def read_thumbnails(catalog: Catalog, corpus: Corpus | None, page: int) -> Thumbnails:
    """Return a page of thumbnails; a number outside of 1..``num_pages`` gives the nearest page."""
    num_names = len(catalog.names)
    num_pages = max(-(-num_names // NUM_SHOWN), 1)
    page = min(max(page, 1), num_pages)
    start = (page - 1) * NUM_SHOWN
    asked = catalog.names.slice(start, NUM_SHOWN)
    names = asked["name"].to_pylist()
    if corpus is None:
        shown = [Thumbnail(name, None, "no picture without --shards") for name in names]
    else:
        places = _places(corpus, asked["key"], start).tolist()
        shown = [_thumbnail(corpus, n, place) for n, place in zip(names, places, strict=True)]
    return Thumbnails(page, num_pages, num_names, shown)


def _places(corpus: Corpus, keys: pa.ChunkedArray, start: int) -> npt.NDArray[np.int64]:
    """Return the rows of keys in a corpus, -1 for an unknown one.

    Without duplicates, names and images have the same order. Looking there first spares a search
    through ten million keys.
    """
    if corpus.index.slice(start, len(keys), ["key"])["key"].to_pylist() == keys.to_pylist():
        return np.arange(start, start + len(keys))
    return corpus.index.find("key", keys)


def _thumbnail(corpus: Corpus, name: str, place: int) -> Thumbnail:
    if place < 0:
        return Thumbnail(name, None, "not in the shards", f"{corpus.data_dir} does not hold it")
    try:
        image = decode_image(corpus.read_image(place))
    except MovekdError as error:
        return Thumbnail(name, None, "damaged", str(error))
    # reducing first is faster for photographs, and no worse to look at
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return Thumbnail(name, file.getvalue())
