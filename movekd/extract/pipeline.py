"""One teacher's way from pixels to sealed Zarr shards.

    ImageLoader (worker processes) -> teacher (device) -> grid, codec (device, a thread behind)
    -> one Zarr shard in memory -> write and seal (a thread behind that)

Comes in: what is missing of a teacher, and a stream of decoded images. ``extract.teacher_loop``
decides whose turn it is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from movekd.cache.catalog import Catalog
from movekd.cache.layout import TeacherLayout
from movekd.cache.spec import CacheSpec
from movekd.cache.writer import TeacherWriter
from movekd.extract.background_worker import BackgroundWorker
from movekd.extract.image_loader import ImageLoader, PixelBatch, image_transform
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.shard_buffer import ShardBuffer, ShardTask, resize_output
from movekd.teachers import Teacher, TeacherOutput


class SideStream:
    """A GPU's second stream, on which features are encoded and copied back beside forward passes.

    On one stream each copy would wait for whatever forward pass was queued meanwhile, and the next
    one for it. Elsewhere than on a GPU it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._device = device

    def mark(self) -> "torch.cuda.Event | None":
        """Return the point that the device's work has come to, as far as it is queued."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    @contextlib.contextmanager
    def after(self, mark: "torch.cuda.Event | None") -> Iterator[None]:
        """Work on the stream, once the device has come to ``mark``.

        What was made before may be dropped as soon as this ends: all of it is done then.
        """
        if self._stream is None or mark is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield
            self._stream.synchronize()


@dataclass(frozen=True)
class Threads:
    """What runs behind the device, shared by all teachers of a build."""

    encoder: BackgroundWorker
    writer: BackgroundWorker


class TeacherBuild:
    """One teacher while its features are built.

    Attributes:
        spec: what is built.
        units: the Zarr shards that are to be built.
        transform: what makes its input.
        seconds: how long it had its turn.
        num_done: rows, which are views of images, that have passed.
    """

    def __init__(
        self,
        store: TeacherWriter,
        shards: Sequence[int],
        catalog: Catalog,
        teacher: Teacher | None,
        spec: CacheSpec,
        options: BuildOptions,
    ) -> None:
        """Take stock of some Zarr shards; ``teacher`` may be None where there are none."""
        self.spec, self.store, self._teacher, self._options = spec, store, teacher, options
        self.transform = image_transform(spec, catalog.geometry)
        self.units = _units(catalog, store.layout, shards)
        self.num_rows = sum(len(unit.places) for unit in self.units)
        self.seconds, self.num_done = 0.0, 0
        self._stats = store.stats.to(torch.device(options.device))
        self._beside = SideStream(torch.device(options.device))

    def move_to(self, device: str) -> None:
        """Bring the teacher to a device, or away from one."""
        assert self._teacher is not None
        self._teacher.to(device)

    def run(
        self, units: Sequence[ShardTask], stream: ImageLoader, behind: Threads, progress: Progress
    ) -> None:
        """Run the teacher over some units; they are written and sealed behind it."""
        assert self._teacher is not None
        for unit in units:
            filling = ShardBuffer(self.store, unit, self.spec.max_error)
            for places in _chunks(unit.places, self.store.calibration.batch_size):
                batch = stream.take(places, self.transform)
                output = None
                if len(batch.unreadable) < len(batch.images):
                    pixels = batch.pixels(self._options.device, self._options.dtype)
                    output = self._teacher.forward(pixels)
                behind.encoder.submit(self._encode, filling, output, batch, self._beside.mark())
                self.num_done += len(batch.images)
                progress(f"{self.spec.name}: build", self.num_done, self.num_rows)
            behind.encoder.submit(self._write, filling, behind.writer)

    def _encode(
        self,
        filling: ShardBuffer,
        output: TeacherOutput | None,
        batch: PixelBatch,
        mark: "torch.cuda.Event | None",
    ) -> None:
        if output is None:
            filling.skip(batch)
            return
        with self._beside.after(mark):
            filling.add(resize_output(output, self.spec), batch, self._stats)

    def _write(self, filling: ShardBuffer, writer: BackgroundWorker) -> None:
        writer.submit(filling.write, self.store.storage)


def _units(catalog: Catalog, teacher: TeacherLayout, shards: Sequence[int]) -> list[ShardTask]:
    """Return the units of the given Zarr shards; a shard wholly in a gap has no rows."""
    rows, size = catalog.rows, teacher.rows_per_shard
    spans = [(shard * size, (shard + 1) * size) for shard in shards]
    checksums = catalog.keys_checksums(spans)
    units = []
    for shard, span, keys in zip(shards, spans, checksums, strict=True):
        low, high = np.searchsorted(rows, span)
        units.append(ShardTask(shard, rows[low:high], np.arange(low, high), keys))
    return units


def _chunks(values: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
