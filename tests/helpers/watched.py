"""`python -m watched ...` runs movekd, notes what it reads, and kills it on request.

WATCH_NOTES  folder of notes: a file of JSON lines per process
WATCH_DIE    "1:4" kills process 1 in step 4 with SIGKILL, before the step has changed anything, but
             not after a restart by torchrun; "*:4:node" kills every process in step 4, and torchrun
WATCH_HOLD   step in which a single process waits to be stopped
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from movekd.cache.reader import TeacherCache
from movekd.cli.main import main
from movekd.corpus.index import Corpus

RANK, ATTEMPT = (int(os.environ.get(n, "0")) for n in ("RANK", "TORCHELASTIC_RESTART_COUNT"))


def note(**values: Any) -> None:
    """Append a line to the notes of this process."""
    path = Path(os.environ["WATCH_NOTES"]) / f"{ATTEMPT}-{RANK}-{os.getpid()}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"attempt": ATTEMPT, "rank": RANK} | values) + "\n")


def noting(method: Callable[..., Any], noted: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Return a method that writes a note before each call."""

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(**noted(self, *args, **kwargs))
        return method(self, *args, **kwargs)

    return watched


def begin_batch(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the note of a batch, or kill this process."""
    step = self.state.global_step + 1
    rank, at, *whole = (os.environ.get("WATCH_DIE") or "-1:0").split(":")
    if rank in ("*", str(RANK)) and (int(at), ATTEMPT) == (step, 0):
        if whole:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if (os.environ.get("WATCH_HOLD"), self.args.world_size, ATTEMPT) == (str(step), 1, 0):
        note(held=step)
        signal.pause()
    return {"step": step, "world": self.args.world_size, "keys": list(inputs["keys"])}


def read_notes(folder: Path) -> list[dict[str, Any]]:
    """Return the notes of all processes; those of a process are in order."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


if __name__ == "__main__":
    from movekd.train.trainer import DistillTrainer

    owners: list[Any] = [Corpus, TeacherCache, DistillTrainer]
    owners[0].read_image = noting(Corpus.read_image, lambda _, row: {"image": int(row)})
    owners[1].read = noting(TeacherCache.read, lambda _, rows: {"rows": [int(r) for r in rows]})
    owners[2].compute_loss = noting(DistillTrainer.compute_loss, begin_batch)
    main()
