"""Run teachers over an image stream and hand their features to the encoder and writer threads.

    ImageLoader (processes) -> teacher (device) -> encode (device, a thread) -> write (a thread)

Input: the Zarr shards that each teacher lacks. Output: those, written and sealed.

Several teachers share the decoded images and take turns on the device. A turn is a row range that
holds whole Zarr shards of every teacher; in it, one teacher after the other runs over its images.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from movekd.cache.catalog import Catalog
from movekd.cache.layout import MAX_SHARD_ROWS
from movekd.cache.spec import CacheSpec
from movekd.cache.writer import TeacherWriter
from movekd.corpus.transforms import ImageTransform
from movekd.extract.background_worker import BackgroundWorker
from movekd.extract.image_loader import ImageLoader, PixelBatch, image_transform, square_key
from movekd.extract.options import BuildContext, BuildOptions, Progress
from movekd.extract.shard_buffer import ShardBuffer, ShardTask, shard_tasks, stored_output
from movekd.teachers import Teacher, TeacherOutput

WAITING_BYTES = 2 * 2**30
"""Decoded images that may wait for the other teachers of a turn; one Zarr shard always may."""


class SideStream:
    """A second CUDA stream, on which features are encoded and copied beside forward passes.

    On one stream each copy would wait for the forward passes that were queued meanwhile, and the
    next pass for the copy. On other devices this class does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._device = device

    def mark(self) -> "torch.cuda.Event | None":
        """Return an event that fires when the work queued on the device so far is done."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    @contextlib.contextmanager
    def after(self, mark: "torch.cuda.Event | None") -> Iterator[None]:
        """Work on the side stream once ``mark`` has fired.

        All work is done when the context ends, so its inputs may be freed then.
        """
        if self._stream is None or mark is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield
            self._stream.synchronize()


@dataclass(frozen=True)
class TeacherJob:
    """Zarr shards of one teacher to build."""

    spec: CacheSpec
    store: TeacherWriter
    shards: Sequence[int]


class TeacherBuild:
    """One teacher during a build.

    Attributes:
        spec: the teacher's spec.
        tasks: the Zarr shards to build.
        transform: what turns images into its input.
        seconds: how long the teacher has run.
        num_done: rows, which are views of images, that it has processed.
    """

    def __init__(
        self, job: TeacherJob, catalog: Catalog, teacher: Teacher | None, options: BuildOptions
    ) -> None:
        """List the tasks of a job; without Zarr shards, ``teacher`` may be None."""
        self.spec, self.store, self._catalog = job.spec, job.store, catalog
        self._teacher, self._options = teacher, options
        self.transform = image_transform(job.spec, catalog.geometry)
        self.tasks = shard_tasks(catalog, job.store, job.shards)
        self.num_rows = sum(len(task.row_ids) for task in self.tasks)
        self.seconds, self.num_done = 0.0, 0
        self._stats = job.store.stats.to(torch.device(options.device))
        self._side_stream = SideStream(torch.device(options.device))

    def move_to(self, device: str) -> None:
        """Move the teacher to a device."""
        assert self._teacher is not None
        self._teacher.to(device)

    def run(
        self,
        tasks: Sequence[ShardTask],
        loader: ImageLoader,
        encoder: BackgroundWorker,
        writer: BackgroundWorker,
        progress: Progress,
    ) -> None:
        """Run the teacher over some tasks; the threads encode, write and seal its features."""
        assert self._teacher is not None
        for task in tasks:
            buffer = ShardBuffer(self.store, task, self._catalog, self.spec)
            size = self.store.calibration.batch_size
            for start in range(0, len(task.row_ids), size):
                batch = loader.next_batch(task.row_ids[start : start + size], self.transform)
                output = None
                if len(batch.unreadable) < len(batch.images):
                    pixels = batch.pixels(self._options.device, self._options.dtype)
                    output = self._teacher.forward(pixels)
                encoder.submit(self._encode, buffer, output, batch, self._side_stream.mark())
                self.num_done += len(batch.images)
                progress(f"{self.spec.name}: build", self.num_done, self.num_rows)
            encoder.submit(writer.submit, buffer.write, self.store.storage)

    def _encode(
        self,
        buffer: ShardBuffer,
        output: TeacherOutput | None,
        batch: PixelBatch,
        mark: "torch.cuda.Event | None",
    ) -> None:
        if output is None:
            buffer.skip(batch)
            return
        with self._side_stream.after(mark):
            buffer.add(stored_output(output, self.spec), batch, self._stats)


Turn = list[tuple[TeacherBuild, list[ShardTask]]]


def run_teachers(builds: Sequence[TeacherBuild], context: BuildContext) -> None:
    """Run every teacher over the images that it lacks; those without tasks are left out."""
    options = context.options
    builds = [build for build in builds if build.tasks]
    if not builds:
        return
    turns = _turns(builds)
    is_moving = len(builds) > 1 and not options.concurrent
    if len(builds) == 1:  # it may be on the CPU to make room for teachers that lack nothing
        builds[0].move_to(options.device)
    with (
        BackgroundWorker("movekd-write", 1) as writer,
        BackgroundWorker("movekd-encode", 2) as encoder,
    ):
        loader = _image_loader(turns, context)
        for turn in turns:
            for build, tasks in turn:
                started = time.perf_counter()
                if is_moving:
                    build.move_to(options.device)
                build.run(tasks, loader, encoder, writer, context.progress)
                if is_moving:
                    build.move_to("cpu")
                if turn is turns[-1]:  # count the time of queued features too
                    encoder.wait()
                    writer.wait()
                build.seconds += time.perf_counter() - started


def _turns(builds: Sequence[TeacherBuild]) -> list[Turn]:
    """Return the turns in row order, each with the tasks of every teacher."""
    rows = _rows_per_turn(builds)
    by_number: dict[int, dict[TeacherBuild, list[ShardTask]]] = {}
    for build in builds:
        for task in build.tasks:
            number = task.shard * build.store.layout.rows_per_shard // rows
            by_number.setdefault(number, {}).setdefault(build, []).append(task)
    return [list(turn.items()) for _, turn in sorted(by_number.items())]


def _rows_per_turn(builds: Sequence[TeacherBuild]) -> int:
    """Return how many rows a turn has: whole Zarr shards of every teacher.

    A longer turn moves teachers between CPU and device less often. But the images that the first
    teacher has used wait in memory for the others.
    """
    rows = max(build.store.layout.rows_per_shard for build in builds)
    if len(builds) > 1:
        squares = {square_key(build.transform) for build in builds}
        image_bytes = sum(3 * square.image_size**2 for square in squares)
        while 2 * rows <= MAX_SHARD_ROWS and 2 * rows * image_bytes <= WAITING_BYTES:
            rows *= 2
    return rows


def _image_loader(turns: Sequence[Turn], context: BuildContext) -> ImageLoader:
    order: list[npt.NDArray[np.int64]] = []
    wanted: dict[ImageTransform, list[npt.NDArray[np.int64]]] = {}
    for turn in turns:
        row_ids: list[npt.NDArray[np.int64]] = []
        for build, tasks in turn:
            of_build = [task.row_ids for task in tasks]
            wanted.setdefault(build.transform, []).extend(of_build)
            row_ids.extend(of_build)
        order.append(np.unique(np.concatenate(row_ids)))
    return ImageLoader(
        context.corpus,
        context.catalog.images,
        context.catalog.views,
        {transform: np.concatenate(row_ids) for transform, row_ids in wanted.items()},
        np.concatenate(order),
        num_workers=context.options.num_workers,
        pin_memory=context.options.device.startswith("cuda"),
    )
