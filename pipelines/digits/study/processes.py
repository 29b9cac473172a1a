"""Processes of one thread each, which end with the study, and the lock on its folder."""

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch


def each(pool: ProcessPoolExecutor, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Do the work for all arguments; the first error stops."""
    for done in as_completed([pool.submit(work, *each) for each in arguments]):
        done.result()


@contextmanager
def pool_of(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of one-thread processes; after an interruption, do not wait for them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin_process)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin_process() -> None:
    """Use one thread, and end with the parent: the next study would make the same runs."""
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the parent handles it
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def lock(work: Path) -> Iterator[None]:
    """Refuse a second study in the same folder."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"study: another study is running in {work}; wait for it.") from None
        yield
