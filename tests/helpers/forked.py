"""Run Python programs in forks of one process that has imported torch, transformers and movekd.

An interpreter needs seconds for these imports, a fork needs none. Use ``run`` where a test needs a
program in its own process, and ``subprocess`` where it needs a fresh interpreter: what imports
load, threads of libraries, installed commands.
"""

import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

IMPORTED = [
    "torch",
    "transformers.models.auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.trainer",
    "pyarrow.parquet",
    "tensorstore",
    "timm",
    "movekd.cli.main",
    "movekd.evaluate.generate",
    "movekd.extract.run",
    "movekd.teachers.providers",
    "movekd.train.run",
]
"""What the first process imports. It starts no threads, which a fork would lose."""
FIXED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Variables that libraries read when they are imported: a program cannot change them."""


class Program:
    """A program that has been started; ``wait`` for its end.

    Args:
        words: as behind `python`: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``. The folder
            of a file can be imported from, the working directory cannot.
        cwd: its working directory; None: this one.
        env: its environment; None: this one.
    """

    def __init__(
        self,
        words: Sequence[Any],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory(prefix="movekd-forked-")
        self._paths = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in FIXED.items():
                patch.setenv(name, value)
            forkserver.set_forkserver_preload(IMPORTED)
            forkserver.ensure_running()
        fork = multiprocessing.get_context("forkserver").Process
        arguments = (self.words, Path.cwd() if cwd is None else cwd, environment, self._paths)
        self._process = fork(target=_run, args=arguments)
        self._process.start()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return its exit code and what it printed."""
        self._process.join()
        out, err = (path.read_text(encoding="utf-8") for path in self._paths)
        self._folder.cleanup()
        code = self._process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(self.words, code, out, err)


def run(words: Sequence[Any], **where: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; the arguments are those of ``Program``."""
    return Program(words, **where).wait()


def follow(block: str, cwd: Path, env: Mapping[str, str]) -> str:
    """Run the lines of a page's shell block one after the other, as a reader would.

    A line calls `movekd` or `python`, or exports variables. Return what they print.
    """
    environment, printed = dict(env), ""
    for line in block.replace("\\\n", " ").splitlines():
        command, *words = shlex.split(line)
        if command == "export":
            environment |= dict(word.split("=", 1) for word in words)
            continue
        assert command in ("movekd", "python"), line
        if command == "movekd":
            words = ["-m", "movekd", *words]
        done = run(words, cwd=cwd, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    return printed


def _run(
    words: Sequence[str], cwd: Path, environment: Mapping[str, str], paths: Sequence[Path]
) -> None:
    """Be the program: its files, folder, environment and import path, then its code."""
    for path, descriptor in zip(paths, (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # the default, as in a fresh interpreter
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    named = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [os.path.abspath(path) for path in named if path] + installed
    first, *rest = words
    if first in ("-m", "-c"):
        sys.argv = [rest[0] if first == "-m" else first, *rest[1:]]
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
    try:
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(first, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
