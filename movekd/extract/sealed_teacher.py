"""Resume a teacher in a cache: which Zarr shards lack, and which of the sealed ones are wrong.

``extract.run`` builds what lacks with the teacher, ``extract.recode`` from another cache.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from movekd.cache import layout
from movekd.cache.catalog import Catalog
from movekd.cache.inventory import damaged_seals, describe, wrong_files
from movekd.cache.storage import Storage
from movekd.cache.writer import TeacherWriter
from movekd.extract.locks import BuildLocks
from movekd.extract.options import Tell


def delete_leftovers(storage: Storage, locks: BuildLocks, teacher: str) -> None:
    """Delete temporary files of killed builds, unless another part may be writing them."""
    if storage.local_dir is None or not locks.is_only_part(teacher):
        return  # the last part deletes them; an object store has no temporary files
    for folder in (layout.group_name(teacher), layout.seals_name(teacher)):
        storage.delete_leftovers(folder)


def open_sealed(
    storage: Storage, catalog: Catalog, teacher: str, tell: Tell
) -> tuple[TeacherWriter, set[int]]:
    """Return a teacher, and its Zarr shards with files that are gone or have another size.

    Seals that cannot be read are deleted: they prove nothing, so their Zarr shards are not sealed.
    The others stay until their Zarr shards can be written again, see ``ShardBuffer.write``.
    """
    num_rows = catalog.num_rows
    store = TeacherWriter(storage, teacher, num_rows)
    for shard, problem in damaged_seals(store).items():
        tell(f"{teacher}: {problem} Zarr shard {shard} is built again.")
        storage.delete(layout.seal_name(teacher, shard))
        store = TeacherWriter(storage, teacher, num_rows)
    store.require_images(catalog)
    files = wrong_files(store)
    wrong = {file.shard for file in files if file.shard is not None}
    if wrong:
        tell(f"{teacher}: {describe(files)}. {count_shards(len(wrong))} built again.")
    return store, wrong


def count_shards(num_shards: int) -> str:
    """Return how many Zarr shards are meant, and the verb."""
    return "1 Zarr shard is" if num_shards == 1 else f"{num_shards} Zarr shards are"


def skipped_table(catalog: Catalog, skipped: Mapping[int, str]) -> pa.Table:
    """Return a table of row, key and reason for the images without features, in row order."""
    rows = np.array(sorted(skipped), np.int64)
    keys = catalog.index.take("key", np.searchsorted(catalog.rows, rows))
    reasons = pa.array([skipped[row] for row in rows.tolist()], pa.string())
    return pa.table({"row": pa.array(rows), "key": keys, "reason": reasons})
