"""What the rows of a cache are: cache.json, index.parquet and names.parquet.

The build makes the catalog from a corpus and extends it when images were appended; the reader
looks names up in it. A row is one view of one image, an image's views stand one after the other.
Appended images start at a multiple of 1,024 rows, so that no teacher's sealed Zarr shard is ever
written again.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from movekd.cache.layout import (
    CACHE_JSON,
    FORMAT_VERSION,
    INDEX,
    MAX_SHARD_ROWS,
    NAMES,
    calibration_name,
)
from movekd.cache.records import CacheRecord
from movekd.cache.seal import as_record, checksum, entry, read_sealed, sealed_bytes
from movekd.cache.storage import Buffer, Storage
from movekd.corpus.anyres import Views, list_views, num_views
from movekd.corpus.images import Geometry
from movekd.corpus.index import Corpus
from movekd.errors import CacheError, CorruptCacheError

_TAKEN_AT_ONCE = 2**20


@dataclass(frozen=True)
class Catalog:
    """The rows of a cache and what names mean them."""

    geometry: Geometry
    view_set: Views
    """Which views of every image there are."""
    corpus_fingerprint: str
    num_images: int
    index: pa.Table
    names: pa.Table

    @property
    def num_rows(self) -> int:
        """Length of every teacher's arrays: the last row plus one, gaps included."""
        return int(self.index["row"][-1].as_py()) + 1 if len(self.index) else 0

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The rows that stand for a view of an image, ascending."""
        return np.asarray(self.index["row"])

    @cached_property
    def views(self) -> npt.NDArray[np.int16]:
        """The number of the view in each of ``rows``."""
        return np.asarray(self.index["view"])

    @cached_property
    def images(self) -> npt.NDArray[np.int64]:
        """The position in the corpus of the image in each of ``rows``."""
        return np.cumsum(self.views == 0, dtype=np.int64) - 1

    def keys_checksum(self, first: int, end: int) -> str:
        """Return the checksum of the images' keys in rows [first, end), a line each.

        Where images have more than the base view, a line says the view as well.

        A shard's seal holds it, so that its features are never taken for other images'.
        """
        low, high = np.searchsorted(self.rows, [first, end]).tolist()
        keys = self.index["key"].slice(low, high - low).to_pylist()
        if self.view_set == "base":
            return checksum(f"{key}\n".encode() for key in keys)
        views = self.views[low:high].tolist()
        return checksum(f"{key} {view}\n".encode() for key, view in zip(keys, views, strict=True))


def open_catalog(storage: Storage) -> Catalog:
    """Return the catalog of a cache.

    Raises:
        CacheError: there is no cache here, or of another format version.
        CorruptCacheError: a file is damaged.
    """
    record = read_cache_json(storage)
    index, names = (_read_table(storage, record, name) for name in (INDEX, NAMES))
    return Catalog(
        record.geometry, record.views, record.corpus_fingerprint, record.num_images, index, names
    )


def update_catalog(
    storage: Storage, corpus: Corpus, geometry: Geometry, views: Views = "base"
) -> Catalog:
    """Make the catalog of a new cache, or extend it by the images appended to its corpus.

    Raises:
        CacheError: the cache is of other views, another geometry or another corpus.
    """
    if not storage.exists(CACHE_JSON):
        _refuse_orphans(storage)
        blocks = [[0, len(corpus)]]
        return _write(storage, corpus, geometry, views, blocks, _index(corpus, views, blocks))
    old = read_cache_json(storage)
    if old.views != views:
        raise CacheError(
            f"{storage.url} is of views '{old.views}', the build asks for '{views}'. A cache has "
            f"the same views of every image: give --views {old.views}, or another --cache."
        )
    if old.geometry != geometry:
        raise CacheError(
            f"{storage.url} is of geometry '{old.geometry}', the build asks for '{geometry}'. A "
            f"cache has one geometry: give --geometry {old.geometry}, or another --cache."
        )
    num_old, num_new = old.num_images, len(corpus) - old.num_images
    if num_new < 0 or corpus.fingerprint(num_old) != old.corpus_fingerprint:
        raise CacheError(
            f"{storage.url} was built from {num_old} images of another corpus than "
            f"{corpus.data_dir} ({len(corpus)} images). Images may only be appended: build into "
            "another --cache, or restore the shards."
        )
    blocks = old.blocks
    if num_new:
        first, count = blocks[-1]
        last = corpus.index.slice(num_old - count, count)
        end = first + int(num_views(last["width"], last["height"], views).sum())
        blocks = [*blocks, [-(-end // MAX_SHARD_ROWS) * MAX_SHARD_ROWS, num_new]]
    index = _index(corpus, views, blocks)
    try:
        catalog = open_catalog(storage)
    except CorruptCacheError:
        pass  # an append was interrupted; cache.json and the corpus say what the tables hold
    else:
        if catalog.index.equals(index) and catalog.names.equals(corpus.names):
            return catalog
        # else there are more images, or the same ones were packed into other tars, or renamed
        what_rows_are = ["row", "key", "view"]
        held = catalog.index.select(what_rows_are)
        if not index.select(what_rows_are).slice(0, len(held)).equals(held):
            raise CacheError(
                f"{storage.url} holds other views than the sizes in {corpus.data_dir}/{INDEX} give "
                "its images; they changed after it was built. Restore that file, or build into "
                "another --cache."
            )
    return _write(storage, corpus, geometry, views, blocks, index)


def _refuse_orphans(storage: Storage) -> None:
    """Refuse to say anew what the rows of sealed features are: nothing in them would contradict.

    Raises:
        CacheError: there are sealed teachers, and no cache.json.
    """
    teachers = [f.removesuffix(".seals") for f in storage.folders() if f.endswith(".seals")]
    sealed = [name for name in teachers if storage.exists(calibration_name(name))]
    if sealed:
        raise CacheError(
            f"{storage.url} has no {CACHE_JSON}, but sealed features of {', '.join(sealed)}; which "
            f"images their rows are is lost with it. Restore {CACHE_JSON}, {INDEX} and {NAMES}, or "
            "build into another --cache."
        )


def read_cache_json(storage: Storage) -> CacheRecord:
    """Return what cache.json says.

    Raises:
        CacheError: there is none, or of another format version.
        CorruptCacheError: it is damaged.
    """
    if not storage.exists(CACHE_JSON):
        raise CacheError(
            f"{storage.url} holds no cache (no {CACHE_JSON}); expected a folder that "
            "`movekd cache build --shards data/ --cache DIR --teacher NAME` made."
        )
    content = read_sealed(storage, CACHE_JSON, CacheRecord.remedy)
    if content.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:  # with other keys, maybe
        raise CacheError(
            f"{storage.url} is of format {content['format_version']}; this movekd reads format "
            f"{FORMAT_VERSION}. Use the version of movekd that built it."
        )
    return as_record(content, f"{storage.url}/{CACHE_JSON}", CacheRecord)


def _read_table(storage: Storage, record: CacheRecord, name: str) -> pa.Table:
    """Return one of the two tables, if it is what cache.json lists."""
    expected = record.files.get(name)
    try:
        raw = storage.read(name)
    except FileNotFoundError:
        raw = b""
    if entry([raw]) != expected:
        raise CorruptCacheError(
            f"{storage.url}/{name} has {len(raw) or 'no'} bytes; {CACHE_JSON} lists "
            f"{expected.size_bytes if expected else 'no such file'} with another checksum. If a "
            "build was interrupted, run it again."
        )
    return pq.read_table(pa.BufferReader(raw))


def _index(corpus: Corpus, views: Views, blocks: list[list[int]]) -> pa.Table:
    """Return index.parquet of a corpus; a block is a first row and how many images follow it."""
    images, view = list_views(corpus.index["width"], corpus.index["height"], views)
    ends = np.cumsum([count for _, count in blocks])
    sizes = np.diff(np.searchsorted(images, ends), prepend=0).tolist()  # rows of each block
    rows = [first + np.arange(size) for (first, _), size in zip(blocks, sizes, strict=True)]
    index = corpus.index
    if views != "base":  # in parts: Arrow counts the bytes of an array's strings in 32 bits
        parts = range(0, max(len(images), 1), _TAKEN_AT_ONCE)
        index = pa.concat_tables(
            index.take(pa.array(images[start : start + _TAKEN_AT_ONCE])) for start in parts
        )
    index = index.add_column(0, "row", pa.array(np.concatenate(rows), pa.int64()))
    return index.add_column(index.schema.get_field_index("key") + 1, "view", pa.array(view))


def _write(
    storage: Storage,
    corpus: Corpus,
    geometry: Geometry,
    views: Views,
    blocks: list[list[int]],
    index: pa.Table,
) -> Catalog:
    """Write the three files, cache.json last."""
    files: dict[str, list[Buffer]] = {}
    for name, table in ((INDEX, index), (NAMES, corpus.names)):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        files[name] = [memoryview(sink.getvalue())]
    fingerprint = corpus.fingerprint()
    record = CacheRecord(
        format_version=FORMAT_VERSION,
        geometry=geometry,
        views=views,
        corpus_fingerprint=fingerprint,
        num_images=len(corpus),
        blocks=blocks,
        files={name: entry(buffers) for name, buffers in files.items()},
    )
    storage.write_many(files | {CACHE_JSON: [sealed_bytes(record)]})  # a full disk changes none
    return Catalog(geometry, views, fingerprint, len(corpus), index, corpus.names)
