"""Create, resume or overwrite a run directory.

OUTPUT/
  config.yaml       the run, with every default filled in
  inputs.json       checksums of corpus, conversations and each teacher's features
  launches.json     the launches of torchrun that have worked on the run
  targets.json      the teachers that it distils from, as `movekd cache ls --json` lists them
  log.json          every logged step, when the run has ended
  checkpoint-N/     checkpoints of transformers' Trainer, for --resume
  runs/             TensorBoard
  model/            the trained parts (see student.checkpoint)
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from movekd import distributed
from movekd.cache.verify import TeacherStatus
from movekd.config import read_yaml, validate
from movekd.errors import ConfigError
from movekd.student.checkpoint import CONFIG_FILE
from movekd.train.config import TrainConfig
from movekd.train.fingerprints import INPUTS_FILE
from movekd.train.trainer import CHECKPOINT_FILE

LAUNCHES_FILE = "launches.json"
LOG_FILE = "log.json"
TARGETS_FILE = "targets.json"
_RUN_FILES = (
    CONFIG_FILE,
    INPUTS_FILE,
    LAUNCHES_FILE,
    TARGETS_FILE,
    LOG_FILE,
    "runs",
    "model",
    "checkpoint-*",
)

_CHANGEABLE_KEYS = (
    "training.dataloader_num_workers",
    "training.dataloader_pin_memory",
    "training.dataloader_prefetch_factor",
    "training.disable_tqdm",
    "training.logging_",
    "training.report_to",
    "training.run_name",
    "training.save_",
    "training.gradient_accumulation_steps",  # these two: global_batch_size is compared
    "training.per_device_train_batch_size",
)
"""Keys, or prefixes of keys, that a resume may change: the trained model stays the same."""
_BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


class RunStart(NamedTuple):
    """How a run starts."""

    checkpoint: Path | None
    """Checkpoint to resume from; None: start from the beginning."""
    samples: int | None
    """Samples per step to keep, of a resumed run; None: as the config says."""
    is_overwriting: bool
    """Whether to delete the files of an earlier run first."""


def plan_start(
    config: TrainConfig,
    output_dir: Path,
    launches: Sequence[str | None] = (),
    *,
    resume: bool,
    overwrite: bool,
) -> RunStart:
    """Return how the run in a folder starts; this deletes nothing yet.

    Args:
        config: the resolved run.
        output_dir: its folder.
        launches: the ``launch_id`` of every rank. A restart by torchrun resumes the run, whatever
            the next two say.
        resume: continue the run in the folder.
        overwrite: replace it.

    Raises:
        ConfigError: the folder holds a run and neither flag is given, or a run of another config,
            or files that are not a run's and would be overwritten.
    """
    if is_restart(output_dir, launches):
        resume, overwrite = True, False
    if overwrite:
        _refuse_to_delete(config, output_dir)
    if overwrite or not (output_dir / CONFIG_FILE).exists():
        return RunStart(None, None, overwrite)
    if not resume:
        raise ConfigError(
            f"{output_dir} holds a run already; give --resume to continue it, --overwrite to "
            "delete it, or another --output."
        )
    old = _with_new_keys(read_yaml(output_dir / CONFIG_FILE))
    new = yaml.safe_load(config.to_yaml())
    changed = [d for d in sorted(_differences(old, new)) if not d.startswith(_CHANGEABLE_KEYS)]
    if changed:
        raise ConfigError(
            f"{output_dir} was begun with another config: {', '.join(changed)} differ. Give the "
            f"old values (in {output_dir / CONFIG_FILE}), or another --output."
        )
    return RunStart(last_checkpoint(output_dir), _samples_to_keep(old, config, output_dir), False)


def is_restart(output_dir: Path, launches: Sequence[str | None]) -> bool:
    """Return whether torchrun started the run in a folder and now restarts its processes.

    Nodes may join and leave, but ``launches`` of all ranks still holds one launch that has worked
    on the run. Without torchrun's folder, its restart count decides.
    """
    if not any(launches):
        return distributed.num_restarts() > 0
    return not _launches(output_dir).isdisjoint(launches)


def delete_run(output_dir: Path) -> None:
    """Delete the files of an earlier run, and no others."""
    for pattern in _RUN_FILES:
        for path in output_dir.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_run_files(
    output_dir: Path,
    config: TrainConfig,
    inputs: dict[str, Any],
    launches: Sequence[str | None] = (),
    teachers: Sequence[TeacherStatus] = (),
) -> None:
    """Write the files that describe a run: config, inputs, teachers and launches."""
    output_dir.mkdir(parents=True, exist_ok=True)
    known = sorted({name for name in launches if name} | _launches(output_dir))
    if known:  # first: a restart must find it, if it finds anything
        _write(output_dir / LAUNCHES_FILE, json.dumps(known) + "\n")
    _write(output_dir / INPUTS_FILE, json.dumps(inputs, indent=1) + "\n")
    table = json.dumps([asdict(teacher) for teacher in teachers], indent=1)
    _write(output_dir / TARGETS_FILE, table + "\n")
    _write(output_dir / CONFIG_FILE, config.to_yaml())


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not complete: Trainer writes the state last
        if number and (path / CHECKPOINT_FILE).exists():
            found.append((int(number[1]), path))
    return max(found)[1] if found else None


def _samples_to_keep(old: dict[str, Any], config: TrainConfig, output_dir: Path) -> int | None:
    """Return the samples per step of a run so far; None if the config's batch keys changed."""
    before = old.get("training") or {}
    if any(before.get(key) != config.training.get(key) for key in _BATCH_KEYS):
        return None
    try:
        inputs = json.loads((output_dir / INPUTS_FILE).read_text(encoding="utf-8"))
        return int(inputs["global_batch_size"])
    except (OSError, ValueError, KeyError, TypeError):  # an older run, or one killed at its start
        return None


def _write(path: Path, text: str) -> None:
    """Write a file atomically: a process that is killed meanwhile leaves no half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _launches(output_dir: Path) -> set[str]:
    """Return the launches of torchrun that have worked on the run in a folder."""
    try:
        return set(json.loads((output_dir / LAUNCHES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


def _refuse_to_delete(config: TrainConfig, output_dir: Path) -> None:
    """Refuse to overwrite a folder that is not a run, or the run that ``init_from`` names."""
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not (output_dir / CONFIG_FILE).exists():
            raise ConfigError(
                f"{output_dir} holds files but no {CONFIG_FILE} of a run, so --overwrite does not "
                "delete it. Give another --output, or empty it yourself."
            )
        if config.init_from is not None and output_dir.resolve() in (
            config.init_from.resolve(),
            *config.init_from.resolve().parents,
        ):
            raise ConfigError(
                f"--overwrite would delete {output_dir}, and init_from {config.init_from} lies "
                "there; give another --output."
            )


def _with_new_keys(old: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config with defaults for keys that are newer than the run."""
    try:
        resolved = validate(TrainConfig, old, CONFIG_FILE).resolved()
    except ConfigError:
        return old  # the caller names the keys that differ
    return dict(yaml.safe_load(resolved.to_yaml()))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted keys in which two configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [path.lstrip(".")]
