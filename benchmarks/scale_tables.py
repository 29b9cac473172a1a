"""Measure ``scale`` on ten million rows and a hundred thousand Zarr shards.

The tables are synthetic: random keys, one name per image, tars that are sparse files of the right
length. The seals are synthetic too and seal nothing, because `movekd cache ls` reads only them.
Each measurement runs in its own process.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from movekd.cache import layout
from movekd.cache.catalog import Catalog, update_catalog
from movekd.cache.reader import open_cache
from movekd.cache.schema import Calibration, EncodingError, ShardSeal
from movekd.cache.seal import sealed_bytes
from movekd.cache.spec import CacheSpec, load_spec
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import Storage, open_storage
from movekd.cache.writer import create_group, stats_checksum
from movekd.corpus.index import INDEX_FILE, INDEX_SCHEMA, NAMES_FILE, NAMES_SCHEMA, open_corpus
from movekd.corpus.parquet_table import PART_ROWS, write_parquet
from movekd.files.ownership import FileEntry
from report import Figure, interleaved_ratio, median_interval

NUM_SEALS = 100_000
NUM_ASKED = 1000
ROWS_PER_TAR = 10_000
IMAGE_BYTES = 100_000
RUNS = 5
PAIRS = 9
MAX_OVER_PYARROW = 1.0
"""Opening compares checksums, checks every number and finds names. pyarrow only reads the columns,
but holds all of them in memory. A user without movekd waits at least that long, so that is the
limit: checks and search must cost no more than holding the tables would."""
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def table_figures(folder: Path, num_rows: int) -> list[Figure]:
    """Open a corpus and a cache of this many rows and look names up, in new processes."""
    data, cache = make_tables(folder, num_rows)
    runs: list[dict[str, float]] = []
    pyarrow_s: list[float] = []

    def ours() -> float:
        runs.append(_run(data, cache, num_rows))
        return runs[-1]["all"]

    def theirs() -> float:
        pyarrow_s.append(_run(data, cache, num_rows, "pyarrow")["all"])
        return pyarrow_s[-1]

    ratio, *interval = interleaved_ratio(ours, theirs, PAIRS)
    seconds = {what: [run[what] for run in runs] for what in runs[0]}
    millions = f"{num_rows / 1e6:g} million rows"

    def figure(name: str, what: str, text: str, **target: float) -> Figure:
        median, low, high = median_interval(seconds[what])
        return Figure(name, median, text, (low, high), **target)

    pyarrow_median, low, high = median_interval(pyarrow_s)
    return [
        Figure(
            "open_10m_rows_over_pyarrow",
            ratio,
            f"time to open corpus and cache of {millions} and to find the rows of {NUM_ASKED:,} "
            "names in the cache, over pyarrow reading the same columns; each in a new process "
            f"after its imports, by turns; median of {PAIRS} pairs",
            (interval[0], interval[1]),
            at_most=MAX_OVER_PYARROW,
        ),
        figure("open_10m_rows_s", "all", f"the seconds of movekd in that; median of {PAIRS}"),
        Figure("pyarrow_read_s", pyarrow_median, "the seconds of pyarrow", (low, high)),
        figure("open_corpus_s", "corpus", "the corpus' part of that, s"),
        figure("open_cache_s", "cache", "the cache's part, checksums of both its tables included"),
        figure("find_names_s", "names", f"the part of the {NUM_ASKED:,} names"),
        figure(
            "find_in_corpus_s", "corpus_names", "s to find the same names in the corpus as well"
        ),
        figure(
            "open_10m_rows_gib",
            "gib",
            "peak memory of that process after all of it, torch included; GiB",
            at_most=1.0,
        ),
        figure("imports_gib", "imports_gib", "of which imports had taken, GiB"),
        Figure(
            "table_bytes_a_row",
            sum((cache / file).stat().st_size for file in (layout.INDEX, layout.NAMES)) / num_rows,
            "bytes of index.parquet and names.parquet of the cache a row; `cache plan` says 165",
        ),
    ]


def seal_figures(folder: Path, num_rows: int) -> list[Figure]:
    """Run `movekd cache ls` on a cache with many seals."""
    _, cache = make_tables(folder, num_rows)
    teacher = make_seals(open_storage(cache), NUM_SEALS)
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "movekd", "cache", "ls", str(cache), "--json"],
            check=True,
            capture_output=True,
        )
        seconds.append(time.perf_counter() - started)
        (listed,) = json.loads(done.stdout)["teachers"]
        assert listed["sealed_shards"] == NUM_SEALS
    store = open_cache(cache)
    started = time.perf_counter()
    store[teacher].require_images(store.catalog)
    median, low, high = median_interval(seconds)
    return [
        Figure(
            "ls_100k_shards_s",
            median,
            f"s of `movekd cache ls` with {NUM_SEALS:,} sealed Zarr shards of one teacher and "
            f"{num_rows / 1e6:g} million rows, its start included; median of {RUNS}",
            (low, high),
            at_most=5.0,
        ),
        Figure(
            "require_images_s",
            time.perf_counter() - started,
            "s that a training takes to read those seals and hold them against the index",
        ),
    ]


def make_tables(folder: Path, num_rows: int) -> tuple[Path, Path]:
    """Return a corpus and a cache of it without teachers; create them if they do not exist."""
    data, cache = folder / "data", folder / "cache"
    if (cache / layout.CACHE_JSON).exists():
        return data, cache
    data.mkdir(parents=True)
    for file, schema in ((INDEX_FILE, INDEX_SCHEMA), (NAMES_FILE, NAMES_SCHEMA)):
        write_parquet(data / file, _parts(num_rows, schema), schema)
    for number in range(-(-num_rows // ROWS_PER_TAR)):
        with (data / f"images-{number:06d}.tar").open("wb") as tar:
            tar.truncate(ROWS_PER_TAR * IMAGE_BYTES)
    update_catalog(open_storage(cache), open_corpus(data), "crop")
    return data, cache


def make_seals(storage: Storage, num_seals: int) -> str:
    """Add a teacher with this many sealed Zarr shards; return its name."""
    catalog = open_cache(storage).catalog
    spec, calibration, stats = _teacher()
    seals = layout.seals_name(spec.name)
    create_group(storage, spec, calibration, stats, catalog.num_rows)
    assert storage.local_dir is not None
    arrays = calibration.layout(spec)
    assert arrays.num_shards(catalog.num_rows) >= num_seals
    for number, seal in enumerate(_seals(catalog, calibration, spec, num_seals)):
        path = storage.local_dir / layout.seal_name(spec.name, number)
        path.write_bytes(sealed_bytes(seal))  # bypasses the storage to avoid fsync
        for name, file in seal.files.items():  # without content, which `ls` does not read
            path = storage.local_dir / layout.group_name(spec.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as opened:
                opened.truncate(file.size_bytes)
    assert len(storage.sizes(seals)) == num_seals + 2
    return spec.name


def _seals(
    catalog: Catalog, calibration: Calibration, spec: CacheSpec, num_seals: int
) -> Iterator[ShardSeal]:
    arrays = calibration.layout(spec)
    size = arrays.rows_per_shard
    spans = [(shard * size, (shard + 1) * size) for shard in range(num_seals)]
    for shard, keys in enumerate(catalog.keys_checksums(spans)):
        files = {
            layout.shard_file(array, shard): FileEntry(
                size_bytes=array.row_bytes * size + 16 * size + 4, xxh3_128=keys
            )
            for array in arrays.arrays.values()
        }
        yield ShardSeal(
            rows=list(spans[shard]),
            keys_xxh3_128=keys,
            files=files,
            skipped={},
            error=EncodingError(
                mean=0.0087 + shard * 1e-9, max=0.0197, num_tokens=size * arrays.num_tokens
            ),
            calibration=calibration.hash,
        )


def _teacher() -> tuple[CacheSpec, Calibration, ChannelStats]:
    """Return the shipped ``dinov2`` with dummy statistics: 64 rows per Zarr shard."""
    import torch

    spec = load_spec("dinov2").with_changes(weights="random")
    stats = ChannelStats(torch.zeros(1024), torch.ones(1024))
    calibration = Calibration(
        spec_fingerprint=spec.fingerprint,
        weights_sha256="0" * 64,
        dtype="bfloat16",
        is_compiled=False,
        batch_size=32,
        num_images=64,
        num_tokens=1369,
        width=1024,
        cls_width=1024,
        num_heads=16,
        channel_stats_xxh3_128=stats_checksum(stats),
    )
    return spec, calibration, stats


def _parts(num_rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the synthetic index or names in parts; both have the same keys."""
    for start in range(0, num_rows, PART_ROWS):
        random = np.random.default_rng(start)
        at = np.arange(start, min(start + PART_ROWS, num_rows))
        raw = random.integers(0, 256, (len(at), 32), np.uint8)
        keys = np.stack([HEX[raw >> 4], HEX[raw & 15]], axis=2).reshape(len(at), 64)
        tar, place = at // ROWS_PER_TAR, at % ROWS_PER_TAR
        columns: dict[str, Any] = {
            "key": _strings(keys),
            "name": _strings(_digits(at // 1000, 5), b"/", _digits(at, 9), b".jpg"),
            "shard": _strings(b"images-", _digits(tar, 6), b".tar"),
            "offset": place * IMAGE_BYTES + 512,
            "size": random.integers(IMAGE_BYTES // 10, IMAGE_BYTES - 512, len(at)),
            "width": np.full(len(at), 640),
            "height": random.integers(300, 500, len(at)),
        }
        yield pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)


def _digits(numbers: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.uint8]:
    """Return the decimal digits of numbers, (N, width) of ASCII."""
    return (numbers[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10 + 48).astype(np.uint8)


def _strings(*pieces: npt.NDArray[np.uint8] | bytes) -> pa.Array:
    """Join pieces of ASCII to Arrow strings of equal length, without one Python string per row."""
    count = next(len(piece) for piece in pieces if not isinstance(piece, bytes))
    parts = [
        np.tile(np.frombuffer(piece, np.uint8), (count, 1)) if isinstance(piece, bytes) else piece
        for piece in pieces
    ]
    text = np.concatenate(parts, axis=1)
    offsets = np.arange(count + 1, dtype=np.int32) * text.shape[1]
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))


def name_of(row: int) -> str:
    """Return the name of the image in a row of the synthetic tables."""
    return f"{row // 1000:05d}/{row:09d}.jpg"


def _run(data: Path, cache: Path, num_rows: int, *what: str) -> dict[str, float]:
    """Return the result of ``measure``, or of ``read_with_pyarrow``, in a new process."""
    command = [sys.executable, __file__, str(data), str(cache), str(num_rows), *what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def measure(data: str, cache: str, num_rows: int) -> dict[str, float]:
    """Return seconds and peak memory of opening both and looking names up."""
    rows = np.random.default_rng(0).integers(0, num_rows, NUM_ASKED)
    names = [name_of(row) for row in rows.tolist()]
    imports_gib, times = _peak_gib(), [time.perf_counter()]
    corpus = open_corpus(data)
    times.append(time.perf_counter())
    opened = open_cache(cache)
    times.append(time.perf_counter())
    found = opened.rows(names)
    times.append(time.perf_counter())
    in_corpus = corpus.rows(names)
    times.append(time.perf_counter())
    assert found.tolist() == in_corpus.tolist() == rows.tolist()
    parts = dict(zip(("corpus", "cache", "names", "corpus_names"), np.diff(times), strict=True))
    all_s = times[3] - times[0]
    return parts | {"all": all_s, "gib": _peak_gib(), "imports_gib": imports_gib}


def read_with_pyarrow(data: str, cache: str, num_rows: int) -> dict[str, float]:
    """Return the seconds in which pyarrow reads the columns that ``measure`` needs, and no more.

    With its own threads, and whole columns in memory. It neither compares checksums nor searches.
    """
    started = time.perf_counter()
    tables = [
        pq.read_table(Path(folder) / file, columns=columns, read_dictionary=["shard"])
        for folder, file, columns in (
            (data, INDEX_FILE, ["shard", "offset", "size", "width", "height"]),
            (cache, layout.INDEX, ["row", "view", "key"]),
            (cache, layout.NAMES, ["name", "key"]),
        )
    ]
    seconds = time.perf_counter() - started
    assert [len(table) for table in tables] == [num_rows] * 3
    return {"all": seconds}


def _peak_gib() -> float:
    """Return the peak memory of this process; getrusage would include the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


if __name__ == "__main__":
    run = read_with_pyarrow if sys.argv[4:] == ["pyarrow"] else measure
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
