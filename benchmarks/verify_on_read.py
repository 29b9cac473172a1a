"""`make bench-verify-on-read`: what `open_cache(verify=...)` and `train --verify-cache` cost.

A cache of 0.6 GB is opened anew and every row is read once, in random order, in batches of 32 into
buffers that are reused. With ``checksum`` this first pass reads each Zarr shard from end to end and
compares it with its seal; the second pass compares nothing. Ways take turns; medians of the rounds.

    python benchmarks/verify_on_read.py [--dir /a/disk] [--rounds 7]
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import get_args

import numpy as np

from cache_data import BenchData, drop_from_page_cache, make_data
from movekd.cache.reader import TeacherCache, open_cache
from movekd.cache.sealed_shards import Verify
from report import Figure, write_figures

NUM_ROWS, BATCH = 1024, 32


def rows_per_s(data: BenchData, store: TeacherCache, seed: int) -> float:
    """Return the rate of reading every row once, in random order."""
    rows, (out, _) = np.random.default_rng(seed).permutation(NUM_ROWS), data.buffers()
    started = time.perf_counter()
    for first in range(0, NUM_ROWS, BATCH):
        store.read(rows[first : first + BATCH], out=out)
    return NUM_ROWS / (time.perf_counter() - started)


def main() -> None:
    """Measure both ways, with the files on the disk and in memory."""
    parser = argparse.ArgumentParser(description="Cost of checksums on read.")
    parser.add_argument("--dir", help="a folder on a disk, not in memory; default: /var/tmp")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=arguments.dir or "/var/tmp") as folder:
        data = make_data(Path(folder) / "data", NUM_ROWS, BATCH)
        files = [path for path in (data.cache / "clip.zarr").rglob("*") if path.is_file()]
        for round_number in range(arguments.rounds):
            for where in ("cold", "warm"):
                for verify in get_args(Verify):
                    if where == "cold":
                        drop_from_page_cache(files)
                    store = open_cache(data.cache, verify=verify)["clip"]
                    rates[f"{where}_{verify}"].append(rows_per_s(data, store, round_number))
                    if where == "warm":
                        again = rows_per_s(data, store, round_number + 100)
                        rates[f"again_{verify}"].append(again)
                    del store
    what = {
        "cold": "rows/s of the first pass, files on the disk",
        "warm": "rows/s of the first pass, files in memory",
        "again": "rows/s of the second pass, files in memory",
    }
    figures = [
        Figure(f"{name}_rows_s", statistics.median(found), f"{what[name.split('_')[0]]}: {name}")
        for name, found in rates.items()
    ]
    write_figures("verify_on_read", figures, is_complete=True)


if __name__ == "__main__":
    main()
