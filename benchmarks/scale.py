"""Measure many rows, many Zarr shards and many processes, for docs/scaling.md (`make bench-scale`).

    python benchmarks/scale.py [--only rows,seals,build,read] [--dir /a/disk]

The disk needs 5 GB. Two processes are faster than one only if each has a core.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import Figure, write_figures
from scale_tables import seal_figures, table_figures
from scale_workers import build_figures, read_figures

NUM_ROWS = 10_000_000

PARTS: dict[str, Callable[[Path], list[Figure]]] = {
    "build": lambda folder: build_figures(folder / "build", 5),
    "read": lambda folder: read_figures(folder / "read", 31),
    "rows": lambda folder: table_figures(folder / "tables", NUM_ROWS),
    "seals": lambda folder: seal_figures(folder / "tables", NUM_ROWS),
}


def main() -> None:
    """Measure everything, or only the parts in --only."""
    parser = argparse.ArgumentParser(description="Benchmarks of size.")
    parser.add_argument("--only", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--dir", help="a folder on a disk, not in memory; default: /var/tmp")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}; not {', '.join(sorted(unknown))}")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir or "/var/tmp") as folder:
        for name in chosen:
            started = time.perf_counter()
            figures += PARTS[name](Path(folder))
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    write_figures("scale", figures, is_complete=set(chosen) == set(PARTS))


if __name__ == "__main__":
    main()
