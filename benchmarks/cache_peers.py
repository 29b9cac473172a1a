"""Other libraries that keep and read samples, side by side with movekd.

Those that movekd does not depend on run in two separate environments, behind ``peers/worker.py``;
they are created when they are missing. One is pinned to old numpy by its packages, so the newest
zarr-python, zarrs and Lance have another one.

Every reader copies its batch into buffers that are reused. Those with random access read the rows
that they are told; the streaming ones shuffle as they do.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
import zarr
from safetensors import safe_open

from cache_data import BenchData
from movekd.cache.layout import group_name
from report import Figure, interleaved_ratio

PEERS = Path(__file__).resolve().parent / "peers"
ENVIRONMENTS = {"requirements.txt": ".venv", "requirements-newest.txt": ".venv-newest"}
"""Files of pinned packages, and the environments that hold them."""
PINNED, NEWEST = (PEERS / folder / "bin" / "python" for folder in ENVIRONMENTS.values())
WARM_BATCHES = 70
"""Read before the first measurement: about one epoch, so that the page cache holds every file."""
Rows = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]
Read = Callable[[Rows], float]
"""Reads a batch and returns the seconds it took."""


def peer_figures(data: BenchData, pairs: int) -> list[Figure]:
    """Return movekd's rate over each peer's, and over the best."""
    for requirements, folder in ENVIRONMENTS.items():
        _create_environment(PEERS / requirements, PEERS / folder)
    (out, _), batches, store = data.buffers(), data.random_batches(seed=3), data.open_warm()
    figures = []
    for name, (what, reader) in PEER_READERS.items():
        with reader(data) as read:
            os.sync()
            seconds: list[float] = []

            def peer(read: Read = read, seconds: list[float] = seconds) -> float:
                seconds.append(read(next(batches)))
                return seconds[-1]

            def ours() -> None:
                store.read(next(batches), out=out)

            for _ in range(WARM_BATCHES):
                peer()
                ours()
            seconds.clear()
            ratio, low, high = interleaved_ratio(peer, ours, pairs)
        rate = data.batch_bytes / statistics.median(seconds) / 1e9
        figures.append(Figure(f"{name}_gb_s", rate, f"{what}, GB/s"))
        figures.append(
            Figure(f"read_over_{name}", ratio, f"movekd's rate over that of {what}", (low, high))
        )
    best = min(figures[1::2], key=lambda figure: figure.value)
    return [
        *figures,
        Figure(
            "read_over_best_peer",
            best.value,
            f"the smallest of these ({best.name}); all in the page cache, random batches of "
            f"{data.batch_size}, median of {pairs} pairs",
            best.interval,
            at_least=1.3,
        ),
    ]


@contextmanager
def _in_process(
    data: BenchData, folder: str, load: Callable[[int, Arrays, int], None]
) -> Iterator[Read]:
    """Yield a reader that loads row by row, after a check of its bytes."""
    _, arrays = data.buffers()

    def read(rows: Rows) -> float:
        started = time.perf_counter()
        for position, row in enumerate(rows.tolist()):
            load(row, arrays, position)
        return time.perf_counter() - started

    rows = next(data.random_batches(seed=4))
    read(rows)
    for name, values in data.memmaps().items():
        np.testing.assert_array_equal(arrays[name], values[rows])
    yield read
    shutil.rmtree(data.folder / folder, ignore_errors=True)


def _samples(data: BenchData, folder: str) -> Iterator[tuple[Path, Arrays]]:
    """Yield a path and the arrays of each row."""
    (data.folder / folder).mkdir()
    maps = data.memmaps()
    for row in range(data.num_rows):
        sample = {name: np.array(values[row]) for name, values in maps.items()}
        yield data.folder / folder / f"{row:06d}", sample


def _safetensors(data: BenchData) -> AbstractContextManager[Read]:
    for path, sample in _samples(data, "safetensors"):
        safetensors.numpy.save_file(sample, path)

    def load(row: int, out: Arrays, position: int) -> None:
        path = data.folder / "safetensors" / f"{row:06d}"
        with safe_open(path, framework="np") as file:  # the fastest of its ways here
            for name, values in out.items():
                values[position] = file.get_tensor(name)

    return _in_process(data, "safetensors", load)


def _torch_load(data: BenchData) -> AbstractContextManager[Read]:
    for path, sample in _samples(data, "torch"):
        torch.save({name: torch.from_numpy(values) for name, values in sample.items()}, path)

    def load(row: int, out: Arrays, position: int) -> None:
        sample = torch.load(data.folder / "torch" / f"{row:06d}", weights_only=True)
        for name, values in out.items():
            values[position] = sample[name].numpy()

    return _in_process(data, "torch", load)


def _zarr(data: BenchData) -> AbstractContextManager[Read]:
    group = zarr.open_group(data.cache / group_name("clip"), mode="r")
    arrays = {name: group[name] for name in data.layout.arrays}

    def load(row: int, out: Arrays, position: int) -> None:
        for name, values in out.items():
            values[position] = arrays[name][row]

    return _in_process(data, "none", load)


@contextmanager
def _worker(
    data: BenchData, kind: str, python: Path = PINNED, folder: Path | None = None
) -> Iterator[Read]:
    """Yield a reader that runs in a peers' environment, after a check of its bytes.

    It writes the rows into a folder of its own, or reads those of ``folder``.
    """
    own = data.folder / kind
    with subprocess.Popen(
        [python, PEERS / "worker.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(data.folder / f"{kind}.log").open("w"),
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(command: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            print(command, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                log = (data.folder / f"{kind}.log").read_text()
                raise SystemExit(f"{kind} failed:\n{log[-2000:]}")
            return answer

        ask(f"prepare {data.source} {folder or own} {kind}")
        maps = data.memmaps()
        for row, digest in json.loads(ask("check")).items():
            content = b"".join(maps[name][int(row)].tobytes() for name in sorted(maps))
            assert hashlib.sha256(content).hexdigest() == digest, f"{kind}, row {row}"

        def read(_: Rows) -> float:
            seconds, num_bytes = ask("batch").split()
            assert int(num_bytes) == data.batch_bytes
            return float(seconds)

        yield read
        process.stdin.close()
        process.kill()  # some of them keep threads that never end
    shutil.rmtree(own, ignore_errors=True)


def _stock_zarr(data: BenchData, kind: str) -> AbstractContextManager[Read]:
    return _worker(data, kind, NEWEST, data.cache / group_name("clip"))


PEER_READERS: dict[str, tuple[str, Callable[[BenchData], AbstractContextManager[Read]]]] = {
    "safetensors": ("safetensors, one file per sample", _safetensors),
    "torch_load": ("torch.load, one file per sample", _torch_load),
    "zarr": ("zarr-python on the same cache, row by row", _zarr),
    "webdataset": ("webdataset, .npy in tar, shuffle(128)", lambda d: _worker(d, "webdataset")),
    "zarr_fancy": ("zarr-python on the same cache, oindex", lambda d: _stock_zarr(d, "zarr_fancy")),
    "zarrs": ("zarr-python with zarrs, row by row", lambda d: _stock_zarr(d, "zarrs")),
    "lance": ("Lance, take of a batch", lambda d: _worker(d, "lance", NEWEST)),
    "theia": ("safetensors in tar, shuffle(128)", lambda d: _worker(d, "theia")),
    "litdata": ("LitData, StreamingDataset shuffled", lambda d: _worker(d, "litdata")),
    "mosaicml": ("MosaicML Streaming, shuffled", lambda d: _worker(d, "mosaicml")),
}


def _create_environment(requirements: Path, folder: Path) -> None:
    """Install peers that movekd does not depend on, once."""
    marker = folder / ".installed"
    if marker.exists() and marker.read_text() == requirements.read_text():
        return
    print(f"installing {requirements} into {folder}, once: minutes, and up to 7 GB")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    quiet = ("--quiet", "--disable-pip-version-check")
    subprocess.run([python, "-m", "pip", "install", *quiet, "-r", requirements], check=True)
    marker.write_text(requirements.read_text())
