"""Run commands in several processes, with torchrun or without, on gloo."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forked import Program

HELPERS = Path(__file__).parent
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Torch 2.15 gives restarted processes the old store, which holds addresses of dead ones."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment(**more: str) -> dict[str, str]:
    """Return a process's environment: one thread, helpers importable, a store per attempt."""
    path = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
    return os.environ | OWN_STORE | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def torchrun(
    *words: Any,
    module: str = "movekd",
    options: Sequence[str] = (),
    processes: int = 2,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module's command line in several processes; return the result."""
    start = [*TORCHRUN, "--nproc-per-node", str(processes), "--standalone", *options, "-m", module]
    return subprocess.run(
        [*start, *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        env=environment(**(env or {})),
    )


def both_processes(
    *words: Any, module: str = "movekd", env: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run a module's command line in two processes without torchrun; return both results."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", **(env or {})}
    started = [
        Program(
            ["-m", module, *words],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place),
        )
        for rank in range(2)
    ]
    return [program.wait() for program in started]


def training(config: Any, output: Path, cache: Any) -> list[Any]:
    """Return the words of `movekd train` for a resolved config, written beside the output."""
    path = output.with_suffix(".yaml")
    path.write_text(config.to_yaml(), encoding="utf-8")
    return ["train", "--config", path, "--cache", cache, "--output", output]


def logged(output: Path) -> list[dict[str, float]]:
    """Return the entries of each logged step of a run that has ended."""
    log = json.loads((output / "log.json").read_text(encoding="utf-8"))
    return [entry for entry in log if "loss" in entry]


def train_in_two_processes(
    config: Any, output: Path, cache: Any, *words: Any, **more: Any
) -> list[dict[str, float]]:
    """Run a config in two processes; return its log."""
    done = both_processes(*training(config, output, cache), *words, **more)
    assert [process.returncode for process in done] == [0, 0], [p.stderr for p in done]
    return logged(output)
