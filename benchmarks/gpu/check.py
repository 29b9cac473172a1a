"""`make gpu-check`: all that only a GPU can show, in at most eight minutes of one H200.

    cd benchmarks && python -m gpu.check [--only mole,codecs] [--output DIR]
    cd benchmarks && python -m gpu.check --smoke        every part on a CPU, shrunken

Each part runs in its own process under its own limit of time, and its figures are written down as
soon as it prints them: a part that fails or is too slow costs only the rest of its own figures.
Writes gpu.json into ``--output``. Default: results/. A smoke run writes smoke.json.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import RESULTS, Figure, machine, write_figures

LIMITS_S = {"mole": 80, "codecs": 25, "fsdp": 45, "train": 180, "build": 150}
"""Most seconds of each part; eight minutes together."""
PREFIX = "figure: "


def main() -> None:
    """Run the parts, print a table, write the figures."""
    parser = argparse.ArgumentParser(description="Checks on one GPU.")
    parser.add_argument("--only", default=",".join(LIMITS_S), help="some of: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="Shrunken, on a CPU.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.smoke)
        return
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(LIMITS_S):
        parser.error(f"--only knows {', '.join(LIMITS_S)}; not {', '.join(sorted(unknown))}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / ("smoke.json" if arguments.smoke else "gpu.json")
    figures: list[Figure] = []
    parts: dict[str, Any] = {}
    for name in chosen:
        found, parts[name] = start_part(name, arguments.smoke)
        figures += found
        write(path, figures, parts)
        print(f"{name}: {parts[name]}", flush=True)
    write_figures("gpu", figures, is_complete=False)
    print(f"written: {path}")
    if not all(part["ended"] == "whole" for part in parts.values()):
        sys.exit(1)


def run_part(name: str, is_smoke: bool) -> None:
    """Run one part in this process; print each figure as a line of JSON."""
    import torch

    from gpu.parts import H200, PARTS
    from movekd.student.hf_loading import quiet_libraries

    quiet_libraries()
    scale = H200
    if is_smoke:
        from gpu.smoke import SMOKE, shrink

        shrink()
        scale = SMOKE
    elif not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --smoke runs the same on a CPU, shrunken.")
    for figure in PARTS[name](scale):
        print(PREFIX + json.dumps(asdict(figure)), flush=True)


def start_part(name: str, is_smoke: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Run one part in a new process; return its figures, its seconds and how it ended."""
    command = [sys.executable, "-m", "gpu.check", "--part", name, *["--smoke"] * is_smoke]
    limit = None if is_smoke else LIMITS_S[name]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command,
                check=False,
                cwd=Path(__file__).parents[1],
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
            )
            ended = "whole" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit} s"
        output.seek(0)
        lines = output.read().splitlines()
    seconds = round(time.perf_counter() - started, 1)
    figures = [read_figure(line) for line in lines if line.startswith(PREFIX)]
    said = [line for line in lines if not line.startswith(PREFIX)]
    if ended != "whole":
        print("\n".join(said[-25:]), flush=True)
        return figures, {"seconds": seconds, "ended": ended, "said": said[-1:]}
    return figures, {"seconds": seconds, "ended": ended}


def read_figure(line: str) -> Figure:
    """Return the figure of a line of ``run_part``."""
    found: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
    interval = found.pop("interval")
    return Figure(**found, interval=None if interval is None else (interval[0], interval[1]))


def write(path: Path, figures: list[Figure], parts: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    content = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "figures": {key: value for figure in figures for key, value in figure.flat.items()},
        "missed": [figure.name for figure in figures if figure.is_met is False],
        "parts": parts,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
