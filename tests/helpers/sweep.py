"""Write runs as `movekd train` does, with a log that a test chooses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import scenes
from movekd.corpus.pack import pack_llava
from movekd.train.config import load_config
from movekd.train.fingerprints import input_fingerprints
from movekd.train.run_dir import write_run_files
from movekd.train.run_record import LOG_FILE, write_recorded
from movekd.train.sources import open_sources

PIPELINE = Path(scenes.__file__).parent
PER_STEP = 4
"""Samples per optimizer step."""


def write_log(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    write_recorded(folder, {LOG_FILE: json.dumps(entries)})


def entries(
    losses: Sequence[float], *, held_out: Sequence[float] = (), **last: float
) -> list[dict[str, Any]]:
    """Return the log of a run that ended: a text loss per step, and held-out ones at every second.

    ``last`` are further figures of the last evaluation.
    """
    steps = [
        {"step": at + 1, "epoch": 0.1, "loss": loss, "loss_text": loss, "samples_per_second": 8.0}
        | {"memory_peak_gib": 1.5 + at / 8}
        for at, loss in enumerate(losses)
    ]
    evaluations = [
        {"step": 2 * at + 2, "eval_loss": loss, "eval_loss_text": loss, "eval_runtime": 1.0}
        for at, loss in enumerate(held_out)
    ]
    if evaluations:
        evaluations[-1] |= last
    ending = {"step": len(losses), "train_runtime": 1.0, "train_samples_per_second": 8.0}
    return [*steps, *evaluations, ending]


def write_compared(
    folder: Path,
    corpus: Path,
    seed: int,
    *overrides: str,
    log: Sequence[dict[str, Any]] = (),
    per_step: int = PER_STEP,
) -> Path:
    """Write a finished run without distillation; return its folder. Without ``log`` it has none."""
    fixed = [f"data.shards={corpus}", f"training.seed={seed}", "distill=null"]
    config = load_config(PIPELINE / "finetune.yaml", [*fixed, *overrides])
    inputs = input_fingerprints(config, open_sources(config, None), per_step)
    write_run_files(folder, config, inputs)
    if log:
        write_log(folder, log)
    return folder


def pack_one(image: Image.Image, folder: Path) -> Path:
    """Pack one image with one conversation into ``folder``; return it."""
    source = folder.parent / f"{folder.name}-source"
    source.mkdir()
    image.save(source / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    entry = {"id": "0", "image": "0.png", "conversations": turns}
    (source / "llava.json").write_text(json.dumps([entry]))
    pack_llava([source / "llava.json"], source, folder, num_workers=1)
    return folder
