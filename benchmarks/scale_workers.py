"""Measure ``scale`` on processes that build or read one cache at the same time.

The processes start once and import everything. Orders reach them through a pipe. A time is measured
from the order to the last answer. Each process has one thread.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_data import BenchData, fastest, make_data
from cache_reading import memmap_gathers
from movekd.cache.layout import MAX_SHARD_ROWS
from movekd.cli.main import app
from movekd.corpus.pack import pack_folder
from photographs import write_jpegs
from report import Figure, interleaved_ratio

TEACHER = """
name: small
description: a ViT of six layers of width 256 with random weights
provider: transformers
model: none
model_args: {model_type: clip_vision_model, hidden_size: 256, intermediate_size: 1024,
  num_hidden_layers: 6, num_attention_heads: 4, image_size: 112, patch_size: 14}
weights: random
image_size: 112
resample: bicubic
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
layer: -2
cls: true
cls_attention: true
grid: native
codec: int8
calibration_images: 64
"""
NUM_READERS = (1, 2, 4)
ROWS, BATCH, BATCHES = 2048, 32, 96

Do = Callable[[Any], object]
"""What a process does with an order."""


@dataclass(frozen=True)
class Workers:
    """Processes that execute orders at the same time."""

    processes: Sequence[Any]
    pipes: Sequence[Connection]

    def tell(self, *orders: Any) -> None:
        """Give one order to each of the first processes; return when all have finished.

        Raises:
            RuntimeError: one of them could not.
        """
        for pipe, order in zip(self.pipes, orders, strict=False):
            pipe.send(order)
        answers = [pipe.recv() for pipe in self.pipes[: len(orders)]]
        if failed := [answer for answer in answers if answer]:
            raise RuntimeError(failed[0])


@contextlib.contextmanager
def started(count: int, prepare: Callable[..., Do], *arguments: Any) -> Any:
    """Yield this many processes; each calls ``prepare(*arguments)`` for its function."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(count)]
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes read it when they import torch
    processes = [
        context.Process(target=_serve, args=(other, prepare, arguments), daemon=True)
        for _, other in pairs
    ]
    for process in processes:
        process.start()
    workers = Workers(processes, [own for own, _ in pairs])
    try:
        workers.tell(*itertools.repeat(None, count))  # imports and preparations are done
        yield workers
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(pipe: Connection, prepare: Callable[..., Do], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    do = prepare(*arguments)
    while True:
        order = pipe.recv()
        try:
            if order is not None:
                do(order)
        except BaseException as error:  # sent to the waiting process
            pipe.send(f"{type(error).__name__}: {error}")
        else:
            pipe.send("")


def build_figures(folder: Path, pairs: int) -> list[Figure]:
    """Compare a build in two processes, each with half of the cache, with one process."""
    num_images = 2 * MAX_SHARD_ROWS  # parts take turns in blocks of this many rows
    write_jpegs(folder / "images", num_images, (320, 240))
    pack_folder(folder / "images", folder / "data")
    (folder / "small.yaml").write_text(TEACHER, encoding="utf-8")
    with started(2, _builder, folder) as workers:

        def in_parts(count: int) -> None:
            workers.tell(*[f"{part}/{count}" for part in range(count)])

        def one() -> None:
            in_parts(1)

        in_parts(2)  # calibrates
        ratio = interleaved_ratio(one, lambda: in_parts(2), pairs, lambda: _unbuild(folder))
        _unbuild(folder)
        seconds = _timed(one)
    return [
        Figure(
            "two_workers_over_one",
            ratio[0],
            f"throughput of two processes that build a part of one cache each (--partition) over "
            f"that of one, one thread a process; {num_images:,} JPEG of 320x240, a ViT of 5 M "
            f"parameters, median of {pairs} pairs",
            ratio[1:],
            at_least=1.7,
        ),
        Figure("one_worker_images_s", num_images / seconds, "images/s of the one process"),
    ]


def _timed(do: Callable[[], object]) -> float:
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


def _builder(folder: Path) -> Do:
    """Return a function that builds the part of an order, as the command line does."""
    import movekd.extract.run
    import movekd.teachers.from_transformers  # noqa: F401 - a build imports it lazily

    command = ["cache", "build", "--teacher", str(folder / "small.yaml")]
    command += ["--shards", str(folder / "data"), "--cache", str(folder / "cache")]
    command += ["--device", "cpu", "--batch-size", "32", "--num-workers", "0"]

    def build(partition: str) -> None:
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            app([*command, "--partition", partition], standalone_mode=False)

    return build


def _unbuild(folder: Path) -> None:
    """Delete every Zarr shard and its seal, but keep the sealed calibration."""
    cache = folder / "cache"
    for seal in (cache / "small.seals").glob("[0-9]*.json"):
        seal.unlink()
    for array in ("tokens", "token_scale", "cls", "cls_attention"):
        shutil.rmtree(cache / "small.zarr" / array / "c", ignore_errors=True)
    os.sync()


def read_figures(folder: Path, pairs: int) -> list[Figure]:
    """Compare reading random batches in several processes with gathering from memmaps."""
    data = make_data(folder, ROWS, BATCH)
    data.open_warm()
    gather = fastest(memmap_gathers(data), data.random_batches())
    ratios = {}
    with started(max(NUM_READERS), _reader, data) as workers:
        for way in ("movekd", gather):
            workers.tell(*[way] * max(NUM_READERS))  # maps every page, on both sides
        for count in NUM_READERS:
            ratios[count] = interleaved_ratio(
                partial(workers.tell, *[gather] * count),
                partial(workers.tell, *["movekd"] * count),
                pairs,
            )
        seconds = _timed(partial(workers.tell, *["movekd"] * max(NUM_READERS)))
    num_bytes = max(NUM_READERS) * BATCHES * data.batch_bytes
    least = min(ratios, key=lambda count: ratios[count][0])
    what = f"rate of reading processes over that of as many on numpy's memmaps ({gather})"
    return [
        Figure(
            "readers_over_memmap",
            ratios[least][0],
            f"{what}, one thread each, in memory: the smallest of those of "
            f"{', '.join(map(str, NUM_READERS))} processes; median of {pairs} pairs",
            ratios[least][1:],
            at_least=0.8,
        ),
        *(
            Figure(f"readers_{count}_over_memmap", ratio[0], f"of {count}", ratio[1:])
            for count, ratio in ratios.items()
        ),
        Figure("readers_gb_s", num_bytes / seconds / 1e9, f"of {max(NUM_READERS)} together, GB/s"),
    ]


def _reader(data: BenchData) -> Do:
    """Return a function that reads random batches in the way of an order."""
    store, (out, _) = data.open_warm(), data.buffers()
    batches = data.random_batches(seed=os.getpid())
    gathers = memmap_gathers(data)

    def ours(rows: Any) -> object:
        return store.read(rows, out=out)

    def read(way: str) -> None:
        one = ours if way == "movekd" else gathers[way]
        for _ in range(BATCHES):
            one(np.asarray(next(batches)))

    return read
