"""Say which image each row of a cache is: cache.json, index.parquet and names.parquet.

Input: a corpus, when a build creates or extends the catalog. Output: ``Catalog``, in which the
reader looks names up. A row is one view of one image; the views of an image follow each other.
Appended images start at a multiple of 1,024 rows, so no sealed Zarr shard is written again.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from movekd.cache.catalog_table import key_lines, numbers, open_table
from movekd.cache.layout import (
    CACHE_JSON,
    FORMAT_VERSION,
    INDEX,
    MAX_SHARD_ROWS,
    NAMES,
    calibration_name,
)
from movekd.cache.schema import CacheRecord
from movekd.cache.seal import as_record, entry, read_sealed, sealed_bytes
from movekd.cache.storage import Buffer, Storage
from movekd.corpus.anyres import Views, list_views, num_views
from movekd.corpus.index import INDEX_SCHEMA, NAMES_SCHEMA, Corpus
from movekd.corpus.parquet_table import PART_ROWS, ParquetTable, lines, write_parquet
from movekd.corpus.transforms import Geometry
from movekd.errors import CacheError, CorruptCacheError, shorten

_KEY, *_PLACE = INDEX_SCHEMA
_SCHEMA = pa.schema([("row", pa.int64()), _KEY, ("view", pa.int16()), *_PLACE])
_SCHEMAS = {INDEX: _SCHEMA, NAMES: NAMES_SCHEMA}
_MAX_GAP_ROWS = MAX_SHARD_ROWS


@dataclass(frozen=True)
class Catalog:
    """The rows of a cache, and the names of their images."""

    geometry: Geometry
    view_set: Views
    """Which views of every image have rows."""
    corpus_fingerprint: str
    num_images: int
    index: ParquetTable
    names: ParquetTable

    @cached_property
    def num_rows(self) -> int:
        """Length of every teacher's arrays: the last row plus one, gaps included."""
        last = self.index.slice(max(len(self.index) - 1, 0), 1, ["row"])["row"]
        return int(last[0].as_py()) + 1 if len(last) else 0

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The rows that hold a view of an image, ascending."""
        rows, start = np.empty(len(self.index), np.int64), 0
        for part in self.index.parts(["row"]):
            rows[start : (start := start + len(part))] = numbers(part["row"], np.int64)
        return rows

    @cached_property
    def has_gaps(self) -> bool:
        """Whether some row holds no image. If not, ``rows`` counts from 0."""
        return len(self.index) < self.num_rows

    @cached_property
    def views(self) -> npt.NDArray[np.int16]:
        """The number of the view in each of ``rows``."""
        return numbers(self.index["view"], np.int16)

    @cached_property
    def images(self) -> npt.NDArray[np.int64]:
        """The position in the corpus of the image in each of ``rows``."""
        return np.cumsum(self.views == 0, dtype=np.int64) - 1

    def zarr_shards(
        self, rows_per_shard: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bytes_]]:
        """Return what the seal of each Zarr shard must say; one pass over the keys, once.

        Returns:
            The rows [first, end) that it covers, (S, 2), and the ``keys_checksums`` of them, (S,).
        """
        if rows_per_shard not in self._zarr_shards:
            firsts = np.arange(0, self.num_rows, rows_per_shard)
            low, high = np.searchsorted(self.rows, [firsts, firsts + rows_per_shard])
            ends = np.where(high > low, self.rows[np.maximum(high, 1) - 1] + 1, firsts)
            spans = np.stack([firsts, ends], axis=1)
            places = np.stack([low, high], axis=1).tolist()
            keys = np.array([*self._checksums_of(places)], "S32")
            self._zarr_shards[rows_per_shard] = spans, keys
        return self._zarr_shards[rows_per_shard]

    @cached_property
    def _zarr_shards(
        self,
    ) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.bytes_]]]:
        return {}

    def keys_checksums(self, spans: Iterable[tuple[int, int]]) -> Iterator[str]:
        """Yield the checksum of the images' keys in each span of rows [first, end), a key per line.

        If images have more than the base view, each line holds the view as well. The seal of a
        Zarr shard holds this checksum, so that its features cannot pass as those of other images.
        Ascending spans take one pass together.
        """
        places = np.searchsorted(self.rows, np.fromiter(spans, np.dtype((np.int64, 2))))
        return self._checksums_of(places.tolist())

    def _checksums_of(self, places: Iterable[tuple[int, int]]) -> Iterator[str]:
        """Yield the checksum of the keys between two places [low, high) of the index, for each."""
        columns = ["key"] if self.view_set == "base" else ["key", "view"]
        text, held, until = memoryview(b""), 0, 0
        starts: npt.NDArray[np.integer[Any]] = np.zeros(1, np.int64)
        for low, high in places:
            if not held <= low <= high <= until:
                held = low - low % PART_ROWS if high <= low - low % PART_ROWS + PART_ROWS else low
                until = min(max(held + PART_ROWS, high), len(self.rows))
                part = self.index.slice(held, until - held, columns)
                text, starts = lines(*part.columns) if len(columns) > 1 else key_lines(part["key"])
            yield xxhash.xxh3_128_hexdigest(text[starts[low - held] : starts[high - held]])


def open_catalog(storage: Storage) -> Catalog:
    """Return the catalog of a cache.

    Raises:
        CacheError: the place holds no cache, or one of another format version.
        CorruptCacheError: a file is damaged.
    """
    record = read_cache_json(storage)
    with ThreadPoolExecutor(2) as both:
        index, names = both.map(
            lambda name: open_table(storage, name, record.files.get(name), _SCHEMAS[name]),
            (INDEX, NAMES),
        )
    if reason := _fault(index, record):
        raise CorruptCacheError(
            f"{storage.url}/{INDEX} {reason}; movekd did not write it. Restore it from a copy, or "
            "build into another --cache."
        )
    return Catalog(
        record.geometry, record.views, record.corpus_fingerprint, record.num_images, index, names
    )


def update_catalog(
    storage: Storage, corpus: Corpus, geometry: Geometry, views: Views = "base"
) -> Catalog:
    """Create the catalog of a new cache, or add the images appended to its corpus.

    Raises:
        CacheError: the cache has other views, another geometry or another corpus.
    """
    if not storage.exists(CACHE_JSON):
        refuse_orphans(storage)
        return _write(storage, corpus, geometry, views, [[0, len(corpus)]])
    old = read_cache_json(storage)
    if old.views != views:
        raise CacheError(
            f"{storage.url} is of views '{old.views}', the build asks for '{views}'. A cache has "
            f"the same views of every image: give --tiles {old.views}, or another --cache."
        )
    if old.geometry != geometry:
        raise CacheError(
            f"{storage.url} is of geometry '{old.geometry}', the build asks for '{geometry}'. A "
            f"cache has one geometry: give --resize-mode {old.geometry}, or another --cache."
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
        last = corpus.index.slice(num_old - count, count, ["width", "height"])
        end = first + int(num_views(last["width"], last["height"], views).sum())
        blocks = [*blocks, [-(-end // MAX_SHARD_ROWS) * MAX_SHARD_ROWS, num_new]]
    try:
        catalog = open_catalog(storage)
    except CorruptCacheError:
        pass  # an append was interrupted; the corpus and cache.json decide the tables
    else:
        is_same, is_moved = _compare(catalog.index, _index(corpus, views, blocks))
        if is_same and catalog.names.equals(corpus.names):
            return catalog
        # otherwise images were appended, packed into other tars, or renamed
        if is_moved:
            raise CacheError(
                f"{storage.url} holds other views than the sizes in {corpus.data_dir}/{INDEX} give "
                "its images; they changed after it was built. Restore that file, or build into "
                "another --cache."
            )
    return _write(storage, corpus, geometry, views, blocks)


def _compare(held: ParquetTable, parts: Iterator[pa.Table]) -> tuple[bool, bool]:
    """Return whether a table equals these parts, and whether its rows became other views."""
    what_rows_are = ["row", "key", "view"]
    is_same, is_moved, start = True, False, 0
    for part in parts:
        found = held.slice(start, len(part))
        start += len(part)
        is_same = is_same and found.equals(part)
        if not is_same:
            expected = part.select(what_rows_are).slice(0, len(found))
            is_moved = is_moved or not found.select(what_rows_are).equals(expected)
    return is_same and start == len(held), is_moved or start < len(held)


def refuse_orphans(storage: Storage) -> None:
    """Refuse to assign new images to sealed features: nothing in the features would contradict."""
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
        CacheError: the file is missing, or of another format version.
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
            f"{storage.url} is of format {shorten(content['format_version'])}; this movekd reads "
            f"format {FORMAT_VERSION}. Use the version of movekd that built it."
        )
    return as_record(content, f"{storage.url}/{CACHE_JSON}", CacheRecord)


def _fault(index: ParquetTable, record: CacheRecord) -> str:
    """Return what is wrong with the rows and views of index.parquet, or an empty string.

    The blocks of cache.json say which rows follow each other, so the table can say nothing else.
    """
    views = numbers(index["view"], np.int16)
    first_rows, counts = (np.array(column, np.int64) for column in zip(*record.blocks, strict=True))
    firsts = np.cumsum(counts) - counts  # the first image of each block
    if record.views == "base":
        num_images, starts, is_right = len(views), firsts, not views.any()
    else:
        images = np.flatnonzero(views == 0)
        follows = (views[1:] == 0) | (views[1:] == views[:-1] + 1)
        num_images, is_right = len(images), bool((views[:1] == 0).all() and follows.all())
        starts = np.append(images, len(views))[np.minimum(firsts, num_images)]
    if not is_right:
        return f"lists views that are not those of the images' '{record.views}'"
    if counts.sum() != num_images or record.num_images != num_images:
        return f"lists {num_images:,} images; {CACHE_JSON} says {record.num_images:,}"
    ends = first_rows + np.diff(starts, append=len(views))
    gaps = first_rows - np.concatenate([[0], ends[:-1]])
    if first_rows[0] != 0 or ((gaps < 0) | (gaps >= _MAX_GAP_ROWS)).any():
        return f"cannot fit the blocks {shorten(record.blocks)} of {CACHE_JSON}"

    for start, end, first in zip(starts, [*starts[1:], len(views)], first_rows, strict=True):
        for at in range(start, end, PART_ROWS):
            rows = numbers(index.slice(at, min(PART_ROWS, end - at), ["row"])["row"], np.int64)
            if not np.array_equal(rows, np.arange(len(rows)) + (first + at - start)):
                return f"lists other rows than the blocks of {CACHE_JSON}"
    return ""


def _index(corpus: Corpus, views: Views, blocks: list[list[int]]) -> Iterator[pa.Table]:
    """Yield the parts of index.parquet; a block is a first row and a number of images."""
    sizes = corpus.index.read(["width", "height"])
    images, view = list_views(sizes["width"], sizes["height"], views)
    ends = np.cumsum([count for _, count in blocks])
    counts = np.diff(np.searchsorted(images, ends), prepend=0).tolist()  # rows of each block
    numbers = [first + np.arange(count) for (first, _), count in zip(blocks, counts, strict=True)]
    rows = np.concatenate(numbers)
    for start in range(0, len(rows), PART_ROWS):
        some = slice(start, start + PART_ROWS)
        first, last = images[some][[0, -1]].tolist()
        part = corpus.index.slice(first, last - first + 1)
        if views != "base":
            part = part.take(pa.array(images[some] - first))
        columns = {name: part[name] for name in part.schema.names}
        columns |= {"row": pa.array(rows[some]), "view": pa.array(view[some], pa.int16())}
        yield pa.table([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _write(
    storage: Storage, corpus: Corpus, geometry: Geometry, views: Views, blocks: list[list[int]]
) -> Catalog:
    """Write the three files, cache.json last, and open them."""
    files: dict[str, list[Buffer]] = {}
    for name, parts, schema in (
        (INDEX, _index(corpus, views, blocks), _SCHEMA),
        (NAMES, corpus.names.parts(), NAMES_SCHEMA),
    ):
        sink = pa.BufferOutputStream()
        write_parquet(sink, parts, schema)
        files[name] = [memoryview(sink.getvalue())]
    record = CacheRecord(
        format_version=FORMAT_VERSION,
        geometry=geometry,
        views=views,
        corpus_fingerprint=corpus.fingerprint(),
        num_images=len(corpus),
        blocks=blocks,
        files={name: entry(buffers) for name, buffers in files.items()},
    )
    # All at once: on a full disk, all keep their content.
    storage.write_many(files | {CACHE_JSON: [sealed_bytes(record)]})
    return open_catalog(storage)
