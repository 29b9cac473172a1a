"""Another library's reader, in an environment of its own: answers a line for each line it gets.

    prepare SOURCE FOLDER KIND      write SOURCE's rows into FOLDER as KIND keeps them; FOLDER of a
                                    Zarr kind has them already
    batch                           read a shuffled batch -> its seconds and bytes
    check                           read one, untimed -> JSON {row: SHA-256 of its bytes}

SOURCE holds one .npy an array. Batches are copied into buffers that are reused, as every reader's
are here. It knows nothing of movekd.
"""

import hashlib
import io
import itertools
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
ROWS_PER_TAR = 64
Sample = dict[str, Any]


def main() -> None:
    """Serve commands until the input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    arrays: dict[str, Any] = {}
    out: dict[str, Any] = {}
    samples: Iterator[Sample] = iter(())
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "prepare":
            source, folder, kind = arguments
            arrays = {p.stem: np.load(p, mmap_mode="r") for p in Path(source).glob("*.npy")}
            out = {
                name: np.zeros((BATCH, *values.shape[1:]), values.dtype)
                for name, values in arrays.items()
            }
            samples = _endless(READERS[kind](arrays, Path(folder)))
            answer = "ready"
        elif command == "batch":
            started = time.perf_counter()
            for position in range(BATCH):
                sample = next(samples)
                for name, batch in out.items():
                    batch[position] = sample[name]
            seconds = time.perf_counter() - started
            answer = f"{seconds} {sum(batch.nbytes for batch in out.values())}"
        else:
            found = {}
            for _ in range(BATCH):
                sample = next(samples)
                content = b"".join(np.asarray(sample[name]).tobytes() for name in sorted(out))
                found[int(sample["row"])] = hashlib.sha256(content).hexdigest()
            answer = json.dumps(found)
        print(answer, file=answers, flush=True)


def _endless(make: Callable[[], Iterator[Sample]]) -> Iterator[Sample]:
    while True:
        yield from make()


def _rows(arrays: dict[str, Any]) -> int:
    return len(arrays["tokens"])


def webdataset(arrays: dict[str, Any], folder: Path) -> Callable[[], Iterator[Sample]]:
    """Read .npy members of tar files, in a shuffled order of tars and then shuffle(128)."""
    import webdataset as wds

    folder.mkdir(parents=True)
    for first in range(0, _rows(arrays), ROWS_PER_TAR):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for row in range(first, min(first + ROWS_PER_TAR, _rows(arrays))):
                for name, values in arrays.items():
                    file = io.BytesIO()
                    np.save(file, values[row])
                    member = tarfile.TarInfo(f"{row:06d}.{name}.npy")
                    member.size = file.tell()
                    file.seek(0)
                    tar.addfile(member, file)
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
    dataset = dataset.shuffle(128).decode()

    def samples() -> Iterator[Sample]:
        for sample in dataset:
            named = {name: sample[f"{name}.npy"] for name in arrays}
            yield named | {"row": int(sample["__key__"])}

    return samples


def theia(arrays: dict[str, Any], folder: Path) -> Callable[[], Iterator[Sample]]:
    """Read tars of one .safetensors member per sample, as Theia publishes its features."""
    import webdataset as wds
    from safetensors.numpy import load, save

    folder.mkdir(parents=True)
    for first in range(0, _rows(arrays), ROWS_PER_TAR):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for row in range(first, min(first + ROWS_PER_TAR, _rows(arrays))):
                content = save({name: np.array(values[row]) for name, values in arrays.items()})
                member = tarfile.TarInfo(f"{row:06d}.safetensors")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(128)

    def samples() -> Iterator[Sample]:
        for sample in dataset:
            yield load(sample["safetensors"]) | {"row": int(sample["__key__"])}

    return samples


def lance(arrays: dict[str, Any], folder: Path) -> Callable[[], Iterator[Sample]]:
    """Take random rows of a Lance dataset, a batch per call; a row is bytes of fixed size."""
    import lance as pylance  # type: ignore[import-not-found]
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        for first in range(0, _rows(arrays), ROWS_PER_TAR):
            columns = {}
            for name, values in arrays.items():
                part = np.ascontiguousarray(values[first : first + ROWS_PER_TAR])
                size = part[0].nbytes
                columns[name] = pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(size), len(part), [None, pa.py_buffer(part)]
                )
            yield pa.record_batch(columns)

    made = iter(batches())
    first = next(made)
    reader = pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], made))
    dataset = pylance.write_dataset(reader, str(folder))

    def samples() -> Iterator[Sample]:
        for rows in _random_rows(_rows(arrays)):
            table = dataset.take(rows.tolist()).combine_chunks()
            columns = {}
            for name, values in arrays.items():
                chunk = table[name].chunk(0)
                whole = np.frombuffer(chunk.buffers()[1], values.dtype)
                start = chunk.offset * values[0].size
                columns[name] = whole[start : start + len(rows) * values[0].size].reshape(
                    len(rows), *values.shape[1:]
                )
            yield from _split(columns, rows)

    return samples


def zarr_fancy(arrays: dict[str, Any], folder: Path) -> Callable[[], Iterator[Sample]]:
    """Read random rows of a Zarr group with zarr-python, a batch per call (``oindex``)."""
    import zarr

    group = zarr.open_group(folder, mode="r")
    stored = {name: group[name] for name in arrays}

    def samples() -> Iterator[Sample]:
        for rows in _random_rows(_rows(arrays)):
            columns = {name: array.oindex[rows] for name, array in stored.items()}
            yield from _split(columns, rows)

    return samples


def zarrs(arrays: dict[str, Any], folder: Path) -> Callable[[], Iterator[Sample]]:
    """Read random rows one by one through zarrs, which is written in Rust.

    It hands an index of several rows that are no slice back to zarr-python.
    """
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    group = zarr.open_group(folder, mode="r")
    stored = {name: group[name] for name in arrays}

    def samples() -> Iterator[Sample]:
        for rows in _random_rows(_rows(arrays)):
            for row in rows.tolist():
                yield {name: array[row] for name, array in stored.items()} | {"row": row}

    return samples


def _random_rows(num_rows: int) -> Iterator[Any]:
    random = np.random.default_rng(0)
    while True:
        yield np.sort(random.choice(num_rows, BATCH, replace=False))


def _split(columns: dict[str, Any], rows: Any) -> Iterator[Sample]:
    for position, row in enumerate(rows.tolist()):
        yield {name: values[position] for name, values in columns.items()} | {"row": row}


def litdata(arrays: dict[str, Any], folder: Path) -> Callable[[], Iterator[Sample]]:
    """Read LitData's chunks through a shuffled StreamingDataset."""
    from litdata import StreamingDataset  # type: ignore[import-not-found]
    from litdata.streaming import Cache  # type: ignore[import-not-found]

    folder.mkdir(parents=True)
    cache = Cache(str(folder), chunk_bytes="64MB")
    for row in range(_rows(arrays)):
        cache[row] = {name: np.array(values[row]) for name, values in arrays.items()} | {"row": row}
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(folder), shuffle=True)
    return lambda: iter(dataset)


def mosaicml(arrays: dict[str, Any], folder: Path) -> Callable[[], Iterator[Sample]]:
    """Read MosaicML Streaming's MDS shards through a shuffled StreamingDataset."""
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]

    columns = {
        name: f"ndarray:{values.dtype}:{','.join(map(str, values.shape[1:]))}"
        for name, values in arrays.items()
    }
    with MDSWriter(out=str(folder), columns=columns | {"row": "int"}) as writer:
        for row in range(_rows(arrays)):
            writer.write({n: np.array(values[row]) for n, values in arrays.items()} | {"row": row})
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return lambda: iter(dataset)


READERS = {
    "webdataset": webdataset,
    "theia": theia,
    "litdata": litdata,
    "mosaicml": mosaicml,
    "lance": lance,
    "zarr_fancy": zarr_fancy,
    "zarrs": zarrs,
}

if __name__ == "__main__":
    main()
