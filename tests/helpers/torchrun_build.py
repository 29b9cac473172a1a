"""`python -m torchrun_build ...` runs movekd with eight rows per Zarr shard, as ``small_shards``.

BUILD_NOTES  folder of notes: a file per rank and attempt, a line "TEACHER SHARD" per Zarr shard
BUILD_STOP   "1:2:SIGKILL" sends a signal to rank 1 before it writes its second Zarr shard, but not
             after a restart by torchrun; "1:2:fail" fails there; "1:2:agent" interrupts torchrun
             and waits for its signal
"""

import os
import signal
import threading
from pathlib import Path
from typing import Any

from movekd.cache import catalog, layout
from movekd.cache.writer import TeacherWriter
from movekd.cli.main import main
from movekd.errors import CacheError

RANK, ATTEMPT = (os.environ.get(n, "0") for n in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
_write = TeacherWriter.write_shard
_num_written = 0
_is_interrupted = threading.Event()


def _note_interrupts() -> None:
    """Set ``_is_interrupted`` before movekd's own handler runs."""
    handle: Any = signal.getsignal(signal.SIGINT)

    def noted(*given: Any) -> None:
        _is_interrupted.set()
        handle(*given)

    signal.signal(signal.SIGINT, noted)


def _write_noted(self: Any, shard: int, *args: Any, **more: Any) -> None:
    global _num_written
    _num_written += 1
    rank, at, what = (os.environ.get("BUILD_STOP") or "-1:0:-").split(":")
    if (rank, int(at), ATTEMPT) == (RANK, _num_written, "0"):
        if what == "fail":
            raise CacheError("the disk of this test is away; bring it back.")
        if what == "agent":
            os.kill(os.getppid(), signal.SIGINT)
            _is_interrupted.wait()
        os.kill(os.getpid(), getattr(signal, what))
    notes = Path(os.environ["BUILD_NOTES"]) / f"{ATTEMPT}-{RANK}.txt"
    with notes.open("a", encoding="utf-8") as file:
        file.write(f"{self.teacher} {shard}\n")
    _write(self, shard, *args, **more)


def read_notes(folder: Path) -> dict[str, list[str]]:
    """Return the lines of each rank and attempt, "attempt-rank" -> lines."""
    return {path.stem: path.read_text(encoding="utf-8").splitlines() for path in folder.iterdir()}


if __name__ == "__main__":
    layout.MAX_SHARD_ROWS = catalog.MAX_SHARD_ROWS = 8  # type: ignore[misc]
    TeacherWriter.write_shard = _write_noted  # type: ignore[method-assign]
    _note_interrupts()
    main()
