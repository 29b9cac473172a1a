"""`make bench-cache`: how fast, how small and how safe a cache is, against targets.

Reads are of the stored bytes of a whole row (``cache_data``) into buffers that are reused, and so
is whatever they are held against. Ratios are medians of interleaved pairs in one run, with their
95% intervals.

    python benchmarks/cache.py [--only warm,cold] [--dir /a/disk]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cache_codec import codec_figures, few_bits_figures
from cache_data import BenchData, make_data
from cache_peers import peer_figures
from cache_reading import cold_figures, loader_figures, warm_figures, write_shard_figures
from cache_safety import flip_figures, kill_figures, memory_figures
from report import Figure, write_figures

NUM_ROWS, BATCH = 2048, 32
PAIRS = 101

READING: dict[str, Callable[[BenchData], list[Figure]]] = {
    "warm": lambda data: warm_figures(data, PAIRS),
    "cold": lambda data: cold_figures(data, 41),
    "peers": lambda data: peer_figures(data, 41),
    "loader": lambda data: loader_figures(data, 21),
}
OTHERS: dict[str, Callable[[Path], list[Figure]]] = {
    "write": lambda folder: write_shard_figures(folder, 21),
    "codec": lambda _: [*codec_figures(), *few_bits_figures()],
    "memory": memory_figures,
    "flips": flip_figures,
    "kills": kill_figures,
}


def main() -> None:
    """Measure everything, or what --only names."""
    parser = argparse.ArgumentParser(description="Benchmarks of the feature cache.")
    names = [*READING, *OTHERS]
    parser.add_argument("--only", default=",".join(names), help="some of: %(default)s")
    parser.add_argument("--dir", help="a folder on a disk, not in memory; default: /var/tmp")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--only knows {', '.join(names)}; not {', '.join(sorted(unknown))}")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir or "/var/tmp") as folder:
        data: BenchData | None = None
        for name in chosen:
            started = time.perf_counter()
            if name in OTHERS:
                figures += OTHERS[name](Path(folder) / name)
            else:
                data = data or make_data(Path(folder) / "data", NUM_ROWS, BATCH)
                figures += READING[name](data)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    write_figures("cache", figures, is_complete=set(chosen) == set(names))


if __name__ == "__main__":
    main()
