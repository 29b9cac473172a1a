"""Compute what a cache needs and when it pays: processes, files, requests, reads, number of runs.

Input: layouts, hours and rates. Output: counts for `movekd cache plan` and docs/scaling.md. The
constants are measured by `make bench-scale` or checked against an S3 server by a test.
"""

import math
from dataclasses import dataclass
from typing import Any

from movekd.analysis.disk_benchmark import DiskRates
from movekd.cache.layout import TeacherLayout

TABLE_BYTES = 165
"""Bytes per row of index.parquet and names.parquet together, if each image has one name."""
HELD_BYTES = 28
"""Bytes per row that a process keeps in memory of a corpus and a cache: where images lie, and row
numbers, which a build needs, and a training if images were appended."""
PART_BYTES = 50 * 2**20
"""s3fs uploads objects of twice this size or more in parts of this size."""
INDEX_POOL_BYTES = 32 * 2**20
"""Bytes of Zarr shard indexes that a reader keeps in memory."""


@dataclass(frozen=True)
class Runs:
    """The training runs that will use a cache.

    Attributes:
        images_per_s: speed of a run without teachers.
        epochs: how often a run sees every image.
    """

    images_per_s: float = 100.0
    epochs: float = 1.0


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks a plan for.

    Attributes:
        build_hours: how long the build may take.
        runs: the training runs that will use the cache.
        read_bytes_per_s: measured read rate of one process; None if unknown.
    """

    build_hours: float
    runs: Runs
    read_bytes_per_s: float | None


@dataclass(frozen=True)
class ResourceEstimate:
    """Counts for one teacher, or for all together."""

    forward_hours: float
    """Forward passes on one device."""
    writers: int
    """Processes with one device each that finish the build within the requested hours."""
    readers: int | None
    """Processes that read what one training run needs; None if the read rate is unknown."""
    zarr_shards: int
    """Zarr shards, which is also the number of seals."""
    files: int
    """Files of Zarr shards and their seals."""
    put_requests: int
    """PUT and POST requests of a build into an object store."""
    get_requests: int
    """GET requests of one training run from an object store."""


def estimate_teacher(
    request: PlanRequest,
    arrays: TeacherLayout,
    num_images: int,
    num_rows: int,
    forward_hours: float,
    build_hours: float,
) -> ResourceEstimate:
    """Return what one teacher needs.

    Args:
        request: hours and runs.
        arrays: the teacher's arrays.
        num_images: images of the corpus; a training run reads their base views once per epoch.
        num_rows: views of the images.
        forward_hours: forward passes on one device.
        build_hours: build with one writer, writing included.
    """
    shards, size = arrays.num_shards(num_rows), arrays.rows_per_shard
    rows = min(size, num_rows)  # a small corpus does not fill a Zarr shard
    puts = 1 + sum(put_requests(rows * a.row_bytes + 16 * size + 4) for a in arrays.arrays.values())
    reads = math.ceil(num_images * request.runs.epochs) * len(arrays.arrays)
    readers = _readers(arrays.row_bytes * request.runs.images_per_s, request)
    indexes = shards * len(arrays.arrays)  # every reader reads each once, if all fit into the pool
    if indexes * 16 * size > INDEX_POOL_BYTES:
        indexes = reads
    return ResourceEstimate(
        forward_hours=forward_hours,
        writers=_writers(build_hours, request),
        readers=readers,
        zarr_shards=shards,
        files=shards * (1 + len(arrays.arrays)),
        put_requests=shards * puts,
        get_requests=reads + min(indexes * (readers or 1), reads) + shards,
    )


def estimate_all(
    request: PlanRequest, parts: list[ResourceEstimate], build_hours: float, read_bytes_per_s: float
) -> ResourceEstimate:
    """Return what all teachers need; they take turns on a device and are read together."""
    sums: dict[str, Any] = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("forward_hours", "zarr_shards", "files", "put_requests", "get_requests")
    }
    return ResourceEstimate(
        writers=_writers(build_hours, request), readers=_readers(read_bytes_per_s, request), **sums
    )


def put_requests(size_bytes: int) -> int:
    """Return the requests that upload one object: one, or one per part plus begin and end."""
    return 1 if size_bytes < 2 * PART_BYTES else 2 + -(-size_bytes // PART_BYTES)


def _writers(build_hours: float, request: PlanRequest) -> int:
    return max(1, math.ceil(build_hours / request.build_hours - 1e-9))


def _readers(read_bytes_per_s: float, request: PlanRequest) -> int | None:
    if request.read_bytes_per_s is None:
        return None
    return max(1, math.ceil(read_bytes_per_s / request.read_bytes_per_s - 1e-9))


def break_even_runs(
    build_hours: float, forward_hours: float, excess_read_hours: float
) -> int | None:
    """Return after how many runs a cache has paid for itself; None means never.

    With teachers in the loop, every run of E epochs over N images pays for their forward passes.
    With a cache it pays only for reading that takes longer than training, because reads run in
    parallel with the training::

        forward = E N / teacher's images/s
        excess  = E N max(0, bytes of a row / read rate - 1 / training's images/s)
        runs    = ceil(build / (forward - excess)),  never if forward <= excess

    Args:
        build_hours: time to build the cache.
        forward_hours: ``forward`` of one run.
        excess_read_hours: ``excess`` of one run.
    """
    saved = forward_hours - excess_read_hours
    if saved <= 0:
        return None
    return max(1, math.ceil(build_hours / saved - 1e-9))  # rounding errors must not add a run


def run_costs(
    row_bytes: int,
    num_images: int,
    runs: Runs,
    disk: DiskRates,
    build_hours: float,
    forward_hours: float,
) -> dict[str, Any]:
    """Return the bytes/s that a run reads, whether the disk keeps up, and the break-even.

    Args:
        row_bytes: bytes to read per image.
        num_images: images of the corpus.
        runs: the training runs.
        disk: measured rates; without them the disk is assumed to keep up.
        build_hours: time to build the cache.
        forward_hours: one pass of the teachers over every image.
    """
    needed, measured = row_bytes * runs.images_per_s, disk.read_bytes_per_s
    excess_s = 0.0
    if measured is not None:
        excess_s = max(0.0, row_bytes / measured - 1 / runs.images_per_s)
    excess_hours = runs.epochs * num_images * excess_s / 3600
    return {
        "read_bytes_per_s": needed,
        "is_read_covered": None if measured is None else measured >= needed,
        "break_even_runs": break_even_runs(build_hours, runs.epochs * forward_hours, excess_hours),
    }
