"""What the figures of ``cache`` are measured on: rows of full size, in a cache and as plain arrays.

576 tokens of 1,024 int8 channels with their scales, a [CLS] embedding and its attention, the
mean over heads: 0.60 MB a row, Student-t(6) values.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from movekd.cache.catalog import open_catalog, update_catalog
from movekd.cache.codecs import codec
from movekd.cache.layout import TeacherLayout
from movekd.cache.reader import TeacherCache, open_cache
from movekd.cache.schema import Calibration, EncodingError
from movekd.cache.spec import CacheSpec, load_spec
from movekd.cache.stats import ChannelStats, StatsAccumulator
from movekd.cache.storage import Storage, open_storage
from movekd.cache.writer import TeacherWriter, create_group, stats_checksum
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder

Arrays = Mapping[str, npt.NDArray[Any]]
TOKENS, WIDTH, HEADS = 576, 1024, 1


@dataclass(frozen=True)
class BenchData:
    """The same rows twice: as a cache, and as one ``.npy`` an array in ``source``."""

    folder: Path
    num_rows: int
    batch_size: int

    @property
    def source(self) -> Path:
        """Folder of the ``.npy`` files."""
        return self.folder / "source"

    @property
    def cache(self) -> Path:
        """The cache; its teacher is ``clip``."""
        return self.folder / "cache"

    def open(self) -> TeacherCache:
        """Return the teacher's features, opened anew."""
        return open_cache(self.cache)["clip"]

    def open_warm(self) -> TeacherCache:
        """Return it with every row in the page cache and mapped, and nothing left to write."""
        os.sync()
        store = self.open()
        for first in range(0, self.num_rows, self.batch_size):
            store.read(np.arange(first, min(first + self.batch_size, self.num_rows)))
        return store

    @cached_property
    def layout(self) -> TeacherLayout:
        """The arrays of a row."""
        return self.open().layout

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch."""
        return self.batch_size * self.layout.row_bytes

    def memmaps(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays, mapped."""
        return {n: np.load(self.source / f"{n}.npy", mmap_mode="r") for n in self.layout.arrays}

    def buffers(self) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        """Return buffers for one batch, as tensors and as views of them in numpy."""
        tensors = self.open().empty(self.batch_size)
        return tensors, {name: tensor.numpy() for name, tensor in tensors.items()}

    def random_batches(self, seed: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """Yield random rows, a batch at a time, for ever."""
        random = np.random.default_rng(seed)
        while True:
            yield random.integers(0, self.num_rows, self.batch_size)


def make_data(folder: Path, num_rows: int, batch_size: int) -> BenchData:
    """Write the rows with movekd's own writer, and beside it as plain arrays."""
    data = BenchData(folder, num_rows, batch_size)
    spec, calibration, stats = bench_teacher()
    storage = empty_cache(folder, spec, calibration, stats, num_rows)
    teacher, writer = calibration.layout(spec), TeacherWriter(storage, spec.name, num_rows)
    data.source.mkdir()
    files = {
        name: np.lib.format.open_memmap(
            data.source / f"{name}.npy", "w+", array.dtype, (num_rows, *array.row_shape)
        )
        for name, array in teacher.arrays.items()
    }
    size = teacher.rows_per_shard
    drawn = shard_rows(size, stats, seed=0)  # such values are slow to draw: once, then turned
    for shard in range(teacher.num_shards(num_rows)):
        count = min(size, num_rows - shard * size)
        arrays = {name: np.roll(values[:count], shard, axis=-1) for name, values in drawn.items()}
        write_rows(writer, shard, arrays)
        for name, values in arrays.items():
            files[name][shard * size : shard * size + len(values)] = values
    for file in files.values():
        file.flush()
    skipped = {"row": pa.array([], pa.int64()), "key": pa.array([], pa.string())}
    writer.write_skipped(pa.table(skipped | {"reason": pa.array([], pa.string())}))
    return data


def bench_teacher() -> tuple[CacheSpec, Calibration, ChannelStats]:
    """Return the shipped ``clip`` in int8 with statistics of Student-t(6) tokens."""
    spec = load_spec("clip").with_changes(weights="random")
    accumulator = StatsAccumulator()
    accumulator.add(student_t_tokens(64, seed=1))
    stats = accumulator.result()
    calibration = Calibration(
        spec_fingerprint=spec.fingerprint,
        weights_sha256="0" * 64,
        dtype="float32",
        is_compiled=False,
        batch_size=32,
        num_images=64,
        num_tokens=TOKENS,
        width=WIDTH,
        cls_width=WIDTH,
        num_heads=HEADS,
        channel_stats_xxh3_128=stats_checksum(stats),
    )
    return spec, calibration, stats


def empty_cache(
    folder: Path, spec: CacheSpec, calibration: Calibration, stats: ChannelStats, num_rows: int
) -> Storage:
    """Return a cache with a catalog of ``num_rows`` images and an empty group."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(num_rows):
        pixels = np.frombuffer(number.to_bytes(12, "little"), np.uint8).reshape(2, 2, 3)
        Image.fromarray(pixels).save(images / f"{number:06d}.png")
    pack_folder(images, folder / "corpus", num_workers=1)
    storage = open_storage(folder / "cache")
    update_catalog(storage, open_corpus(folder / "corpus"), "crop")
    create_group(storage, spec, calibration, stats, num_rows)
    return storage


def write_rows(writer: TeacherWriter, shard: int, arrays: Arrays) -> None:
    """Write and seal the rows of one Zarr shard, as a build does."""
    first = shard * writer.layout.rows_per_shard
    span = (first, first + len(arrays["tokens"]))
    keys = next(open_catalog(writer.storage).keys_checksums([span]))
    unmeasured = EncodingError(mean=0.0, max=0.0, num_tokens=1)
    writer.write_shard(
        shard,
        arrays,
        keys_xxh3_128=keys,
        skipped={},
        error=unmeasured,
    )


def student_t_tokens(num_images: int, seed: int) -> Tensor:
    """Return heavy-tailed tokens (B, N, D) with channels as unlike as CLIP ViT-L/14's.

    Over channels, |mean| has median 0.17 and maximum 7.68, the standard deviation 0.76 and 4.20
    (Theia's published statistics), both log-normal in between.
    """
    fixed = np.random.default_rng(0)
    spread = np.sort(fixed.standard_normal(WIDTH))
    spread /= spread[-1]
    mean = 0.17 * np.exp(np.log(7.68 / 0.17) * fixed.permutation(spread))
    mean *= fixed.choice([-1, 1], WIDTH)
    std = 0.76 * np.exp(np.log(4.20 / 0.76) * fixed.permutation(spread))
    values = np.random.default_rng(seed).standard_t(6, (num_images, TOKENS, WIDTH)) / 1.5**0.5
    return torch.from_numpy((values * std + mean).astype(np.float32))


def shard_rows(count: int, stats: ChannelStats, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Return the stored arrays of ``count`` rows."""
    random = np.random.default_rng(seed)
    stored = codec("int8").encode(student_t_tokens(count, seed=100 + seed), stats)
    arrays = {name: values.numpy() for name, values in stored.items()}
    arrays["cls"] = random.standard_t(6, (count, WIDTH)).astype(np.float16)
    arrays["cls_attention"] = random.random((count, HEADS, TOKENS)).astype(np.float16)
    return arrays


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Make the kernel forget the files' pages; those that a process has mapped stay."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fastest(ways: Mapping[str, Any], batches: Iterator[npt.NDArray[np.int64]]) -> str:
    """Return the name of the way that reads batches fastest."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(40):
        for name, way in ways.items():
            rows = next(batches)
            started = time.perf_counter()
            way(rows)
            seconds[name].append(time.perf_counter() - started)
    return min(seconds, key=lambda name: float(np.median(seconds[name])))
