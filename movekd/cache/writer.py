"""A teacher's group: created once, then filled one whole Zarr shard after the other.

A shard file is assembled here (chunks one after the other, then the index of Zarr's sharding
codec), because that is a plain write at the disk's rate; ``zarr`` makes the group and its
metadata. Used by ``extract.run`` alone.

One writer a Zarr shard, always: two lose data. ``build`` holds the lock that says so.
"""

import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from movekd.cache import layout
from movekd.cache.codecs import ArrayLayout, codec
from movekd.cache.contents import TeacherContents
from movekd.cache.layout import TeacherLayout
from movekd.cache.schema import (
    Calibration,
    EncodingError,
    FileEntry,
    GroupRecord,
    ShardSeal,
    SkippedSeal,
)
from movekd.cache.seal import checksum, entry, read_record, sealed_bytes, write_sealed
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Buffer, Storage
from movekd.errors import CacheError

_ABSENT = 2**64 - 1
"""Offset and size, in a shard's index, of a chunk that is not there."""
_VERSIONS = ("movekd", "numpy", "open_clip_torch", "timm", "torch", "transformers", "zarr")


def stats_checksum(stats: ChannelStats) -> str:
    """Return the checksum that ``Calibration.channel_stats_xxh3_128`` holds."""
    return checksum(
        np.ascontiguousarray(part.cpu().numpy(), "<f4").tobytes()
        for part in (stats.mean_D, stats.std_D)
    )


def create_group(
    storage: Storage,
    spec: CacheSpec,
    calibration: Calibration,
    stats: ChannelStats,
    num_rows: int,
) -> None:
    """Create ``<teacher>.zarr`` with all its arrays, then seal the calibration.

    The weights' place is not stored, only what it holds (their SHA-256): a path of one machine
    means nothing on another.
    """
    stored_spec = spec.model_dump(mode="json")
    stored_spec["weights"] = "random" if spec.weights == "random" else "given"
    stored_spec = json.loads(json.dumps(stored_spec, sort_keys=True))  # whatever a YAML's order
    attributes = layout.group_attributes(
        stored_spec, spec.fingerprint, calibration.weights_sha256, _versions()
    )
    files = _group_files(calibration.layout(spec), spec.compressor, num_rows, attributes, stats)
    _write_group_files(storage, spec.name, num_rows, files, {})
    write_sealed(storage, layout.calibration_name(spec.name), calibration)


def resize_group(
    storage: Storage, spec: CacheSpec, calibration: Calibration, num_rows: int
) -> None:
    """Lengthen a teacher's arrays to ``num_rows``, and mend their metadata; rows stay as they are.

    The metadata is made anew, not edited, and the seal that holds the number of rows is written
    last: interrupted at any instant, the next call does the same again.
    """
    sealed = read_record(storage, layout.metadata_name(spec.name), GroupRecord)
    group = layout.group_name(spec.name)
    arrays = [f"{name}/zarr.json" for name in calibration.layout(spec).arrays]
    found = storage.read_many([f"{group}/{name}" for name in arrays])
    is_whole = all(entry([found.get(f"{group}/{n}", b"")]) == sealed.files.get(n) for n in arrays)
    if is_whole and sealed.num_rows >= num_rows:
        return
    files = _group_files(calibration.layout(spec), spec.compressor, num_rows, {}, None)
    files = {name: files[name] for name in arrays}  # the group's own stays that of its first build
    _write_group_files(storage, spec.name, num_rows, files, sealed.files)


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
    stats: ChannelStats | None,
) -> dict[str, bytes]:
    """Return what zarr writes for an empty group, file name -> content; statistics if given."""
    files: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(files), attributes=dict(attributes))
    for array in teacher.arrays.values():
        group.create_array(
            array.name,
            shape=(num_rows, *array.row_shape),
            dtype=array.dtype,
            chunks=(1, *array.row_shape),
            shards=(teacher.rows_per_shard, *array.row_shape),
            compressors=_zarr_compressors(compressor, array),
            fill_value=array.fill_value,
            dimension_names=array.dimension_names,
        )
    if stats is not None:
        for name, part in (("channel_mean", stats.mean_D), ("channel_std", stats.std_D)):
            values = part.cpu().numpy()
            created = group.create_array(
                name,
                shape=values.shape,
                dtype="float32",
                chunks=values.shape,
                compressors=None,
                fill_value=float("nan"),
                dimension_names=("channel",),
            )
            created[:] = values
    return {name: content.to_bytes() for name, content in sorted(files.items())}


class TeacherWriter(TeacherContents):
    """What a build writes one teacher's Zarr shards through; ``create_group`` comes first.

    Attributes:
        codec: what encodes the tokens.
        stats: channel statistics of the sealed calibration, float32 (D,).
    """

    def __init__(self, storage: Storage, teacher: str, num_rows: int) -> None:
        super().__init__(storage, teacher, num_rows)
        self.codec = codec(self.spec.codec)
        self.stats = ChannelStats.from_numpy(self.channel_mean, self.channel_std)

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
            keys_xxh3_128: checksum of the images' keys, see ``Catalog.keys_checksum``.
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


def shard_buffers(
    rows: npt.NDArray[Any], array: ArrayLayout, rows_per_shard: int, compressor: str
) -> list[Buffer]:
    """Return the bytes of one shard file: the chunks in row order, then the index.

    The index holds offset and size of each chunk as little-endian uint64 (both 2**64 - 1 for
    a chunk that is not there) and ends with its CRC-32C.

    Source: Zarr v3 specification, codec ``sharding_indexed``, version 1.0.
    """
    rows = np.ascontiguousarray(rows, np.dtype(array.dtype).newbyteorder("<"))
    if compressor == "none":
        chunks: list[Buffer] = [rows.reshape(-1).view(np.uint8).data]
        sizes = np.full(len(rows), array.row_bytes, np.uint64)
    else:
        encoder = _chunk_compressor(compressor)
        chunks = [encoder.encode(row) for row in rows]
        sizes = np.array([len(chunk) for chunk in chunks], np.uint64)
    index = np.full((rows_per_shard, 2), _ABSENT, "<u8")
    index[: len(rows), 1] = sizes
    index[: len(rows), 0] = np.cumsum(sizes) - sizes
    raw_index = index.tobytes()
    return [*chunks, raw_index + google_crc32c.value(raw_index).to_bytes(4, "little")]


def _chunk_compressor(compressor: str) -> Any:
    if compressor == "zstd":
        return Zstd(level=1)
    return Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE)


def _zarr_compressors(compressor: str, array: ArrayLayout) -> Sequence[Any] | None:
    """Return what zarr must know to read the chunks of ``_chunk_compressor``."""
    if compressor == "none":
        return None
    if compressor == "zstd":
        return [zarr.codecs.ZstdCodec(level=1)]
    item_bytes = np.dtype(array.dtype).itemsize
    return [zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=item_bytes)]


def _versions() -> dict[str, str]:
    """Return the versions that decide what features come out."""
    versions = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metadata of other packages is not ours to judge
        for name in _VERSIONS:
            versions[name] = importlib.metadata.version(name)
    return versions
