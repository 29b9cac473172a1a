"""Another library's reader, in an environment of its own: answers a line for each line it gets.

    prepare SOURCE FOLDER KIND      write SOURCE's rows into FOLDER as KIND keeps them
    batch                           read a shuffled batch -> its seconds and bytes
    check                           read one, untimed -> JSON {row: SHA-256 of its bytes}

SOURCE holds one .npy an array. Batches are copied into buffers that are reused, as every reader's
are here. It knows nothing of movekd.
"""

import hashlib
import io
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


READERS = {"webdataset": webdataset, "litdata": litdata, "mosaicml": mosaicml}

if __name__ == "__main__":
    main()
