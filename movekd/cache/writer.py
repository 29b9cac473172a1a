"""A teacher's group: created once, then filled one whole Zarr shard after the other.

A shard file is assembled here (chunks one after the other, then the index of Zarr's sharding
codec), because that is a plain write at the disk's rate; ``zarr`` makes the group and its
metadata. Used by ``build.run`` alone.

One writer a Zarr shard, always: two lose data. ``build`` holds the lock that says so.
"""

import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from movekd.cache import layout
from movekd.cache.codec import ChannelStats
from movekd.cache.layout import ArrayLayout, TeacherLayout
from movekd.cache.seal import Buffer, checksum, file_entry, read_sealed, write_atomic, write_sealed
from movekd.cache.spec import CacheSpec
from movekd.errors import CacheError

_ABSENT = 2**64 - 1
"""Offset and size, in a shard's index, of a chunk that is not there."""
CALIBRATION = "calibration.json"
METADATA = "metadata.json"
_VERSIONS = ("movekd", "numpy", "open_clip_torch", "timm", "torch", "transformers", "zarr")


@dataclass(frozen=True)
class Calibration:
    """What the calibration step settled, once, for every worker, resume and appended image."""

    spec_fingerprint: str
    weights_sha256: str
    batch_size: int
    num_images: int
    num_tokens: int
    width: int
    cls_width: int | None
    num_heads: int | None
    channel_stats_xxh3_128: str
    """Of the mean's bytes followed by the standard deviation's, float32 little-endian."""

    def layout(self, spec: CacheSpec) -> TeacherLayout:
        """Return the arrays that this teacher's features need."""
        return layout.teacher_layout(
            spec.codec,
            self.num_tokens,
            self.width,
            cls_width=self.cls_width,
            num_heads=self.num_heads,
        )

    @property
    def hash(self) -> str:
        """What each seal names: the checksum over everything above."""
        return checksum([repr(sorted(asdict(self).items())).encode()])


def stats_checksum(stats: ChannelStats) -> str:
    """Return the checksum that ``Calibration.channel_stats_xxh3_128`` holds."""
    return checksum(
        np.ascontiguousarray(part.cpu().numpy(), "<f4").tobytes()
        for part in (stats.mean_D, stats.std_D)
    )


def create_group(
    cache_dir: Path, spec: CacheSpec, calibration: Calibration, stats: ChannelStats, num_rows: int
) -> None:
    """Create ``<teacher>.zarr`` with all its arrays, then seal the calibration.

    The weights' place is not stored, only what it holds (their SHA-256): a path of one machine
    means nothing on another.
    """
    stored_spec = spec.model_dump(mode="json")
    stored_spec["weights"] = "random" if spec.weights == "random" else "given"
    stored_spec = json.loads(json.dumps(stored_spec, sort_keys=True))  # whatever a YAML's order
    group = zarr.create_group(
        layout.group_dir(cache_dir, spec.name),
        overwrite=True,
        attributes=layout.group_attributes(
            stored_spec, spec.fingerprint, calibration.weights_sha256, _versions()
        ),
    )
    teacher = calibration.layout(spec)
    for array in teacher.arrays.values():
        group.create_array(
            array.name,
            shape=(num_rows, *array.row_shape),
            dtype=array.dtype,
            chunks=(1, *array.row_shape),
            shards=(teacher.rows_per_shard, *array.row_shape),
            compressors=_zarr_compressors(spec.compressor, array),
            fill_value=array.fill_value,
            dimension_names=array.dimension_names,
        )
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
    seal_metadata(cache_dir, spec.name)
    write_sealed(layout.seals_dir(cache_dir, spec.name) / CALIBRATION, asdict(calibration))


def read_calibration(cache_dir: Path, teacher: str) -> Calibration | None:
    """Return the sealed calibration, or None when there is none yet."""
    path = layout.seals_dir(cache_dir, teacher) / CALIBRATION
    if not path.exists():
        return None
    try:
        return Calibration(**read_sealed(path))
    except TypeError:
        raise CacheError(
            f"{path} has other keys than this version of movekd writes; build with the version "
            "that the group's attributes name, or delete the teacher's group and seals."
        ) from None


def resize_group(cache_dir: Path, teacher: str, num_rows: int) -> None:
    """Lengthen a teacher's arrays to ``num_rows``; nothing sealed is touched."""
    group = zarr.open_group(layout.group_dir(cache_dir, teacher), mode="r+")
    short = [
        array
        for name, array in group.arrays()
        if not name.startswith("channel_") and array.shape[0] < num_rows
    ]
    for array in short:
        array.resize((num_rows, *array.shape[1:]))
    if short:  # otherwise a damaged zarr.json would be sealed as it is
        seal_metadata(cache_dir, teacher)


def seal_metadata(cache_dir: Path, teacher: str) -> None:
    """Write the checksums of the group's small files: every zarr.json and channel statistics."""
    group = layout.group_dir(cache_dir, teacher)
    files = [*group.rglob("zarr.json"), *group.glob("channel_*/c/*")]
    entries = {str(path.relative_to(group)): file_entry(path) for path in sorted(files)}
    write_sealed(layout.seals_dir(cache_dir, teacher) / METADATA, {"files": entries})


def write_shard(
    cache_dir: Path,
    spec: CacheSpec,
    calibration: Calibration,
    shard: int,
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    skipped: Mapping[int, str],
    error: Mapping[str, float],
) -> None:
    """Write one Zarr shard of every array, then its seal.

    Args:
        cache_dir: the cache.
        spec: the teacher's spec.
        calibration: the sealed calibration; its hash goes into the seal.
        shard: number of the Zarr shard.
        arrays: each array's rows from the first of the shard on, (k, *row_shape), where k may
            be smaller than ``rows_per_shard`` in the last shard of a corpus.
        skipped: rows without features, and why; their values must be NaN in ``arrays``.
        error: statistics of what was written against what the teacher produced.
    """
    teacher = calibration.layout(spec)
    group, seals = layout.group_dir(cache_dir, spec.name), layout.seals_dir(cache_dir, spec.name)
    entries: dict[str, Any] = {}
    for name, array in teacher.arrays.items():
        buffers = shard_buffers(arrays[name], array, teacher.rows_per_shard, spec.compressor)
        file = layout.shard_file(array, shard)
        write_atomic(group / file, buffers, temporary_dir=seals)
        entries[file] = {
            "xxh3_128": checksum(buffers),
            "size_bytes": sum(len(buffer) for buffer in buffers),
        }
    first = shard * teacher.rows_per_shard
    write_sealed(
        layout.seal_path(cache_dir, spec.name, shard),
        {
            "rows": [first, first + len(arrays["tokens"])],
            "files": entries,
            "skipped": {str(row): reason for row, reason in sorted(skipped.items())},
            "error": dict(error),
            "calibration": calibration.hash,
        },
    )


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
