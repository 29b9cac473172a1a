"""Create a teacher's group, then write its Zarr shards one by one.

Input: the arrays of a Zarr shard, encoded. Output: its files, and then its seal. ``zarr`` makes the
group and its metadata. ``shard_file`` makes shard files, because zarr writes them at a third of the
disk's rate.

Two writers of one Zarr shard would lose data; the build holds the lock that prevents it.
"""

import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from movekd.cache import layout
from movekd.cache.codecs import codec
from movekd.cache.contents import TeacherContents
from movekd.cache.layout import TeacherLayout
from movekd.cache.schema import (
    Calibration,
    EncodingError,
    GroupRecord,
    ShardSeal,
    SkippedSeal,
)
from movekd.cache.seal import checksum, entry, read_record, sealed_bytes, write_sealed
from movekd.cache.shard_file import shard_buffers, zarr_compressors
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage
from movekd.errors import CacheError
from movekd.files.ownership import FileEntry

PACKAGES = (
    "movekd",
    "numcodecs",
    "numpy",
    "open_clip_torch",
    "pillow",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "zarr",
)
"""Packages whose versions decide the bytes of a cache. Caches of earlier movekd record fewer."""


def stats_checksum(stats: ChannelStats) -> str:
    """Return the checksum that ``Calibration.channel_stats_xxh3_128`` holds."""
    return checksum(array.tobytes() for array in stats.group_arrays().values())


def create_group(
    storage: Storage,
    spec: CacheSpec,
    calibration: Calibration,
    stats: ChannelStats,
    num_rows: int,
) -> None:
    """Create ``<teacher>.zarr`` with all its arrays, then seal the calibration.

    The group records the SHA-256 of the weights and not their path, which means nothing on another
    machine.
    """
    attributes = _attributes(spec, calibration)
    arrays = stats.group_arrays()
    files = _group_files(calibration.layout(spec), spec.compressor, num_rows, attributes, arrays)
    _write_group_files(storage, spec.name, num_rows, files, {})
    write_sealed(storage, layout.calibration_name(spec.name), calibration)


def _attributes(spec: CacheSpec, calibration: Calibration) -> dict[str, Any]:
    """Return the attributes of a teacher's group."""
    # Independent of the order in the YAML.
    stored_spec = json.loads(json.dumps(spec.as_stored(), sort_keys=True))
    return {
        "movekd": {
            "format_version": layout.FORMAT_VERSION,
            "spec": stored_spec,
            "spec_fingerprint": spec.fingerprint,
            "weights_sha256": calibration.weights_sha256,
            "versions": _versions(),
            "decoding": codec(calibration.codec_of(spec)).decoding,
        }
    }


def resize_group(
    storage: Storage, spec: CacheSpec, calibration: Calibration, num_rows: int
) -> None:
    """Lengthen a teacher's arrays to ``num_rows`` and repair their metadata; rows do not change.

    The metadata is created again, not edited, and the seal with the number of rows is written last.
    So after an interruption the next call does the same again.
    """
    sealed = read_record(storage, layout.metadata_name(spec.name), GroupRecord)
    _mend_group(storage, spec, calibration, sealed)
    group = layout.group_name(spec.name)
    arrays = [f"{name}/zarr.json" for name in calibration.layout(spec).arrays]
    found = storage.read_many([f"{group}/{name}" for name in arrays])
    is_whole = all(entry([found.get(f"{group}/{n}", b"")]) == sealed.files.get(n) for n in arrays)
    if is_whole and sealed.num_rows >= num_rows:
        return
    files = _group_files(calibration.layout(spec), spec.compressor, num_rows, {}, {})
    # zarr.json of the group stays as the first build wrote it.
    files = {name: files[name] for name in arrays}
    _write_group_files(storage, spec.name, num_rows, files, sealed.files)


def _mend_group(
    storage: Storage, spec: CacheSpec, calibration: Calibration, sealed: GroupRecord
) -> None:
    """Write again the metadata that is gone or damaged, if it comes out as it was sealed.

    It does unless the versions of libraries changed. The channel statistics need the teacher.
    """
    group = layout.group_name(spec.name)
    constant = layout.group_arrays(calibration.codec_of(spec), calibration.width)
    arrays = (*calibration.layout(spec).arrays, *constant)
    names = ["zarr.json", *(f"{array}/zarr.json" for array in arrays)]
    found = storage.read_many([f"{group}/{name}" for name in names])
    wrong = [n for n in names if entry([found.get(f"{group}/{n}", b"")]) != sealed.files.get(n)]
    if wrong:
        made = _group_files(
            calibration.layout(spec),
            spec.compressor,
            sealed.num_rows,
            _attributes(spec, calibration),
            constant,
        )
        for name in wrong:
            if entry([made[name]]) == sealed.files.get(name):
                storage.write(f"{group}/{name}", [made[name]])


def _write_group_files(
    storage: Storage,
    teacher: str,
    num_rows: int,
    files: Mapping[str, bytes],
    others: Mapping[str, FileEntry],
) -> None:
    """Write the small files of a group, then the seal that lists them and the ``others``."""
    for name, content in files.items():
        storage.write(f"{layout.group_name(teacher)}/{name}", [content])
    entries = {**others, **{name: entry([content]) for name, content in files.items()}}
    sealed = GroupRecord(num_rows=num_rows, files=entries)
    write_sealed(storage, layout.metadata_name(teacher), sealed)


def _group_files(
    teacher: TeacherLayout,
    compressor: str,
    num_rows: int,
    attributes: Mapping[str, Any],
    constant: Mapping[str, npt.NDArray[np.generic]],
) -> dict[str, bytes]:
    """Return the files that zarr writes for a group without rows: its arrays and ``constant``."""
    files: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(files), attributes=dict(attributes))
    for array in teacher.arrays.values():
        group.create_array(
            array.name,
            shape=(num_rows, *array.row_shape),
            dtype=array.dtype,
            chunks=(1, *array.row_shape),
            shards=(teacher.rows_per_shard, *array.row_shape),
            compressors=zarr_compressors(compressor, array),
            fill_value=array.fill_value,
            dimension_names=array.dimension_names,
        )
    for name, values in constant.items():
        is_per_channel = values.shape == (teacher.width,)
        created = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape,
            compressors=None,
            fill_value=float("nan") if values.dtype.kind == "f" else 0,
            dimension_names=["channel"]
            if is_per_channel
            else [f"{name}_{axis}" for axis in range(values.ndim)],
        )
        created[...] = values
    return {name: content.to_bytes() for name, content in sorted(files.items())}


class TeacherWriter(TeacherContents):
    """What a build writes one teacher's Zarr shards through; ``create_group`` comes first.

    Attributes:
        codec: what encodes the tokens.
        stats: channel statistics of the sealed calibration, float32 (D,).
    """

    def __init__(self, storage: Storage, teacher: str, num_rows: int) -> None:
        super().__init__(storage, teacher, num_rows)
        self.codec = codec(self.codec_name)
        self.stats = ChannelStats.from_numpy(self.group_arrays)

    def write_shard(
        self,
        shard: int,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        keys_xxh3_128: str,
        skipped: Mapping[int, str],
        error: EncodingError,
    ) -> None:
        """Write one Zarr shard of every array, then its seal.

        Args:
            shard: number of the Zarr shard.
            arrays: rows of each array, the first row of the shard first: (k, *row_shape). In the
                last shard of a corpus, k may be smaller than ``rows_per_shard``.
            keys_xxh3_128: checksum of the images' keys, see ``Catalog.keys_checksums``.
            skipped: rows without features, and why; their values must be NaN in ``arrays``.
            error: error of the stored tokens against the teacher's tokens.

        Raises:
            CacheError: another build has sealed this Zarr shard with other content.
        """
        storage, rows_per_shard = self.storage, self.layout.rows_per_shard
        files = {
            layout.shard_file(array, shard): shard_buffers(
                arrays[name], array, rows_per_shard, self.spec.compressor
            )
            for name, array in self.layout.arrays.items()
        }
        with ThreadPoolExecutor(1) as pool:  # the checksums are ready before the disk is
            entries = pool.submit(lambda: {file: entry(content) for file, content in files.items()})
            group = layout.group_name(self.teacher)
            storage.write_many({f"{group}/{file}": content for file, content in files.items()})
        first, seal = shard * rows_per_shard, layout.seal_name(self.teacher, shard)
        record = ShardSeal(
            rows=[first, first + len(arrays["tokens"])],
            keys_xxh3_128=keys_xxh3_128,
            files=entries.result(),
            skipped={str(row): reason for row, reason in sorted(skipped.items())},
            error=error,
            calibration=self.calibration.hash,
        )
        if not storage.create(seal, sealed_bytes(record)):
            raise CacheError(
                f"{storage.url}/{seal} was made by another build in the meantime, with other "
                "content; run `movekd cache verify` to see what is whole."
            )

    def write_skipped(self, skipped: pa.Table) -> None:
        """Write skipped.parquet (row, key, reason) and its seal, if they say something else."""
        name, seal = layout.skipped_name(self.teacher), layout.skipped_seal_name(self.teacher)
        sink = pa.BufferOutputStream()
        pq.write_table(skipped, sink)
        content = bytes(sink.getvalue())
        sealed = sealed_bytes(SkippedSeal(files={name.rpartition("/")[2]: entry([content])}))
        if self.storage.read_many([name, seal]) != {name: content, seal: sealed}:
            self.storage.write(name, [content])
            self.storage.write(seal, [sealed])


def _versions() -> dict[str, str]:
    versions = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some packages have faulty metadata
        for name in PACKAGES:
            versions[name] = importlib.metadata.version(name)
    return versions
