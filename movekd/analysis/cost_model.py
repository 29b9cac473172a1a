"""How much of everything a cache needs: processes, files, requests, memory. Arithmetic of ``plan``.

Comes in: layouts, hours and rates. Goes out: counts, for `movekd cache plan` and docs/scaling.md.
What they stand on is in the constants here, each measured by `make bench-scale` or held against
an S3 server by a test.
"""

import math
from dataclasses import dataclass
from typing import Any

from movekd.analysis.payback import Runs
from movekd.cache.layout import TeacherLayout

TABLE_BYTES = 165
"""Of index.parquet and names.parquet together, a row of one view of one name."""
HELD_BYTES = 28
"""A row, of what a process keeps of a corpus and a cache: where images lie; and row numbers, which
a build holds, and a training if images were appended."""
PART_BYTES = 50 * 2**20
"""Objects of twice that are uploaded in such parts: s3fs' rule."""
INDEX_POOL_BYTES = 32 * 2**20
"""What a reader keeps of the Zarr shards' indexes, see ``cache.tensorstore_rows``."""


@dataclass(frozen=True)
class PlanRequest:
    """What the counts are for.

    Attributes:
        build_hours: how long the build may take.
        runs: one of the training runs to come.
        read_bytes_per_s: what one reading process gets; None when it is not known.
    """

    build_hours: float
    runs: Runs
    read_bytes_per_s: float | None


@dataclass(frozen=True)
class ResourceEstimate:
    """Counts for one teacher, or for all together."""

    forward_hours: float
    """Of the forward passes on one device."""
    writers: int
    """Processes with a device each that build it within the hours asked for."""
    readers: int | None
    """Processes that read what one training run needs; None when a reader's rate is not known."""
    zarr_shards: int
    """As many as there are seals."""
    files: int
    """Of Zarr shards, and their seals."""
    put_requests: int
    """PUT and POST requests of a build into an object store."""
    get_requests: int
    """GET requests of one training run from an object store."""


def teacher_needs(
    asked: PlanRequest,
    arrays: TeacherLayout,
    num_images: int,
    num_rows: int,
    forward_hours: float,
    build_hours: float,
) -> ResourceEstimate:
    """Return what one teacher needs.

    Args:
        asked: hours and runs.
        arrays: the teacher's arrays.
        num_images: a training run reads the base view of each, once an epoch.
        num_rows: views of the images.
        forward_hours: forward passes on one device.
        build_hours: what one writer takes, writing included.
    """
    shards, size = arrays.num_shards(num_rows), arrays.rows_per_shard
    rows = min(size, num_rows)  # a corpus may not fill its only Zarr shard
    puts = 1 + sum(put_requests(rows * a.row_bytes + 16 * size + 4) for a in arrays.arrays.values())
    reads = math.ceil(num_images * asked.runs.epochs) * len(arrays.arrays)
    readers = _readers(arrays.row_bytes * asked.runs.images_per_s, asked)
    indexes = shards * len(arrays.arrays)  # each read once by every reader, if all can be kept
    if indexes * 16 * size > INDEX_POOL_BYTES:
        indexes = reads
    return ResourceEstimate(
        forward_hours=forward_hours,
        writers=_writers(build_hours, asked),
        readers=readers,
        zarr_shards=shards,
        files=shards * (1 + len(arrays.arrays)),
        put_requests=shards * puts,
        get_requests=reads + min(indexes * (readers or 1), reads) + shards,
    )


def all_needs(
    asked: PlanRequest, parts: list[ResourceEstimate], build_hours: float, read_bytes_per_s: float
) -> ResourceEstimate:
    """Return what all teachers need: they take turns on a device, and are read side by side."""
    sums: dict[str, Any] = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("forward_hours", "zarr_shards", "files", "put_requests", "get_requests")
    }
    return ResourceEstimate(
        writers=_writers(build_hours, asked), readers=_readers(read_bytes_per_s, asked), **sums
    )


def put_requests(size_bytes: int) -> int:
    """Return the requests that upload one object: one, or its parts between a begin and an end."""
    return 1 if size_bytes < 2 * PART_BYTES else 2 + -(-size_bytes // PART_BYTES)


def _writers(build_hours: float, asked: PlanRequest) -> int:
    return max(1, math.ceil(build_hours / asked.build_hours - 1e-9))


def _readers(read_bytes_per_s: float, asked: PlanRequest) -> int | None:
    if asked.read_bytes_per_s is None:
        return None
    return max(1, math.ceil(read_bytes_per_s / asked.read_bytes_per_s - 1e-9))
