"""The rows of a recoded cache: those of its source, index and names included.

``extract.recode`` copies them first. Images that were appended to the source since the last
recoding follow, as in a build.
"""

import pyarrow as pa

from movekd.cache.catalog import Catalog, open_catalog, read_cache_json, refuse_orphans
from movekd.cache.layout import CACHE_JSON, INDEX, NAMES
from movekd.cache.reader import FeatureCache
from movekd.cache.schema import CacheRecord
from movekd.cache.seal import entry, sealed_bytes
from movekd.cache.storage import Storage
from movekd.corpus.index import fingerprint_keys
from movekd.corpus.parquet_table import PART_ROWS
from movekd.errors import CacheError, ConfigError
from movekd.extract.locks import build_lock


def require_other_place(source: Storage, into: Storage) -> None:
    """Refuse an output that is the source, or lies in it or around it.

    Raises:
        ConfigError: names both.
    """
    if source.local_dir is not None and into.local_dir is not None:
        own, other = source.local_dir.resolve(), into.local_dir.resolve()
        is_same = own == other or own in other.parents or other in own.parents
    else:
        own_url, other_url = (f"{each.url.rstrip('/')}/" for each in (source, into))
        is_same = own_url.startswith(other_url) or other_url.startswith(own_url)
    if is_same:
        raise ConfigError(
            f"--output {into.url} is the cache {source.url} that is read, or lies in it or around "
            "it. A recoding writes another cache; give another --output."
        )


def copy_catalog(source: FeatureCache, into: Storage) -> Catalog:
    """Return the catalog of the output, once it is that of the source.

    Raises:
        CacheError: the output is a cache of other images, geometry or views.
    """
    record = read_cache_json(source.storage)
    files = {name: source.storage.read(name) for name in (INDEX, NAMES)}
    if any(entry([content]) != record.files.get(name) for name, content in files.items()):
        raise CacheError(
            f"the tables of {source.url} changed while they were read, because a build added "
            "images; run the same command again."
        )
    files[CACHE_JSON] = sealed_bytes(record)
    with build_lock(into, ".lock", wait=True):
        for name in files:
            into.delete_leftovers(name)
        if into.exists(CACHE_JSON):
            _require_grown(source, record, into)
        else:
            refuse_orphans(into)
        if into.read_many([*files]) != files:
            into.write_many({name: [content] for name, content in files.items()})
    return open_catalog(into)


def _require_grown(source: FeatureCache, record: CacheRecord, into: Storage) -> None:
    """Refuse an output whose images are not the first ones of the source.

    Only cache.json is compared: after an interruption the tables may be newer.
    """
    held = read_cache_json(into)
    keys = source.keys.slice(0, held.num_images)
    is_first = (
        (held.geometry, held.views) == (record.geometry, record.views)
        and held.blocks == record.blocks[: len(held.blocks)]
        and len(keys) == held.num_images
        and fingerprint_keys(_parts(keys)) == held.corpus_fingerprint
    )
    if not is_first:
        raise CacheError(
            f"{into.url} is a cache of other images, geometry or views than {source.url}; its rows "
            f"are not those of the source ({held.num_images:,} images, geometry {held.geometry}, "
            f"views {held.views}; expected the first of {record.num_images:,}, {record.geometry}, "
            f"{record.views}). Give another --output."
        )


def _parts(keys: pa.ChunkedArray) -> list[pa.ChunkedArray]:
    return [keys.slice(start, PART_ROWS) for start in range(0, len(keys), PART_ROWS)]
