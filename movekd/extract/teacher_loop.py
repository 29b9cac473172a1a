"""Several teachers over the same decoded images, one of them on the device at a time.

Comes in: what is missing of each teacher. A turn is a row range, whole Zarr shards of everyone; in
it, one teacher after the other runs over its images. ``extract.pipeline`` is what happens then.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from movekd.cache.catalog import Catalog
from movekd.cache.layout import MAX_SHARD_ROWS
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import ImageTransform
from movekd.extract.background_worker import BackgroundWorker
from movekd.extract.image_loader import ImageLoader, square_key
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.pipeline import TeacherBuild, Threads
from movekd.extract.shard_buffer import ShardTask

WAITING_BYTES = 2 * 2**30
"""Decoded images that may wait for the other teachers of a turn, unless one Zarr shard is more."""

Turn = list[tuple[TeacherBuild, list[ShardTask]]]


def run_teachers(
    builds: Sequence[TeacherBuild],
    corpus: Corpus,
    catalog: Catalog,
    options: BuildOptions,
    progress: Progress,
) -> None:
    """Run every teacher over the images that it lacks.

    Args:
        builds: the teachers; those that lack nothing take no turn.
        corpus: the images.
        catalog: which views of them the rows are.
        options: device, decoding processes, and whether teachers stay on the device together.
        progress: told of every batch.
    """
    builds = [build for build in builds if build.units]
    if not builds:
        return
    turns = _turns(builds)
    has_company = len(builds) > 1 and not options.concurrent
    if len(builds) == 1:  # it may have been put aside for others that lack nothing
        builds[0].move_to(options.device)
    with (
        BackgroundWorker("movekd-write", 1) as writer,
        BackgroundWorker("movekd-encode", 2) as encoder,
    ):
        stream = _stream(turns, corpus, catalog, options)
        for turn in turns:
            for build, units in turn:
                started = time.perf_counter()
                if has_company:
                    build.move_to(options.device)
                build.run(units, stream, Threads(encoder, writer), progress)
                if has_company:
                    build.move_to("cpu")
                if turn is turns[-1]:  # what is still on its way counts as well
                    encoder.wait()
                    writer.wait()
                build.seconds += time.perf_counter() - started


def _turns(builds: Sequence[TeacherBuild]) -> list[Turn]:
    """Return who has which units in which turn, in row order."""
    rows = _rows_a_turn(builds)
    by_number: dict[int, dict[TeacherBuild, list[ShardTask]]] = {}
    for build in builds:
        for unit in build.units:
            number = unit.shard * build.store.layout.rows_per_shard // rows
            by_number.setdefault(number, {}).setdefault(build, []).append(unit)
    return [list(turn.items()) for _, turn in sorted(by_number.items())]


def _rows_a_turn(builds: Sequence[TeacherBuild]) -> int:
    """Return how many rows a turn has: whole Zarr shards of everyone.

    What the first teacher of a turn has passed waits for the others in memory; the longer a turn,
    the more rarely teachers move to the device and away.
    """
    rows = max(build.store.layout.rows_per_shard for build in builds)
    if len(builds) > 1:
        squares = {square_key(build.transform) for build in builds}
        image_bytes = sum(3 * square.image_size**2 for square in squares)
        while 2 * rows <= MAX_SHARD_ROWS and 2 * rows * image_bytes <= WAITING_BYTES:
            rows *= 2
    return rows


def _stream(
    turns: Sequence[Turn], corpus: Corpus, catalog: Catalog, options: BuildOptions
) -> ImageLoader:
    order: list[npt.NDArray[np.int64]] = []
    wanted: dict[ImageTransform, list[npt.NDArray[np.int64]]] = {}
    for turn in turns:
        places: list[npt.NDArray[np.int64]] = []
        for build, units in turn:
            own = [unit.places for unit in units]
            wanted.setdefault(build.transform, []).extend(own)
            places.extend(own)
        order.append(np.unique(np.concatenate(places)))
    return ImageLoader(
        corpus,
        catalog.images,
        catalog.views,
        {transform: np.concatenate(places) for transform, places in wanted.items()},
        np.concatenate(order),
        num_workers=options.num_workers,
        pin_memory=options.device.startswith("cuda"),
    )
