"""The output folder of a run: begun, gone on with, replaced, and never lost unasked.

OUTPUT/
  config.yaml       the run, every default filled in
  inputs.json       what it reads: checksums of corpus, conversations and each teacher's features
  launches.json     the starts of torchrun that have worked on it, if any
  targets.json      the teachers that it distils from, as `movekd cache ls --json` lists them
  log.json          every logged step, when the run has ended
  checkpoint-N/     Trainer's, for --resume
  runs/             TensorBoard
  model/            what this run ends with (see student.files)
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
    "training.gradient_accumulation_steps",  # these two by way of global_batch_size
    "training.per_device_train_batch_size",
)
"""Keys, or how they begin, that do not change what a run ends with."""
_BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


class RunStart(NamedTuple):
    """How a run begins."""

    checkpoint: Path | None
    """What to go on from; None begins anew."""
    samples: int | None
    """Samples a step that the run was begun with, where only the processes may differ since."""
    is_overwriting: bool
    """Whether files of an earlier run are to be deleted first."""


def plan_start(
    config: TrainConfig,
    output_dir: Path,
    launches: Sequence[str | None] = (),
    *,
    resume: bool,
    overwrite: bool,
) -> RunStart:
    """Return how the run in a folder begins or goes on; deletes nothing yet.

    Args:
        config: the resolved run.
        output_dir: its folder.
        launches: the start of torchrun that each process is of. One that the run was begun under
            goes on with it, whatever the next two say.
        resume: go on with the run that is there.
        overwrite: replace it.

    Raises:
        ConfigError: there is a run here already, or another one than the config describes, or
            something that is no run and would be overwritten.
    """
    if is_restart(output_dir, launches):
        resume, overwrite = True, False
    if overwrite:
        _refuse_to_delete(config, output_dir)
    if overwrite or not (output_dir / CONFIG_FILE).exists():
        return RunStart(None, None, overwrite)
    if not resume:
        raise ConfigError(
            f"{output_dir} holds a run already; give --resume to go on with it, --overwrite to "
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
    """Return whether torchrun has begun the run in a folder and now starts its processes again.

    Nodes may come and go, but one start of torchrun that has worked on the run is still among
    ``launches``, those of all distributed. Where torchrun keeps no folder, its count says.
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
    """Note what this run is, what it distils from, and which starts of torchrun worked on it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    known = sorted({name for name in launches if name} | _launches(output_dir))
    if known:  # first, so that a restart finds it with whatever else is there
        _write(output_dir / LAUNCHES_FILE, json.dumps(known) + "\n")
    _write(output_dir / INPUTS_FILE, json.dumps(inputs, indent=1) + "\n")
    table = json.dumps([asdict(teacher) for teacher in teachers], indent=1)
    _write(output_dir / TARGETS_FILE, table + "\n")
    _write(output_dir / CONFIG_FILE, config.to_yaml())


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, or None."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the state is written last
        if number and (path / CHECKPOINT_FILE).exists():
            found.append((int(number[1]), path))
    return max(found)[1] if found else None


def _samples_to_keep(old: dict[str, Any], config: TrainConfig, output_dir: Path) -> int | None:
    """Return the samples a step that a run was begun with, unless the config divides it anew."""
    before = old.get("training") or {}
    if any(before.get(key) != config.training.get(key) for key in _BATCH_KEYS):
        return None
    try:
        inputs = json.loads((output_dir / INPUTS_FILE).read_text(encoding="utf-8"))
        return int(inputs["global_batch_size"])
    except (OSError, ValueError, KeyError, TypeError):  # of an older run, or cut off at its start
        return None


def _write(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all: a process may be killed meanwhile."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _launches(output_dir: Path) -> set[str]:
    """Return the starts of torchrun that have worked on the run in a folder."""
    try:
        return set(json.loads((output_dir / LAUNCHES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


def _refuse_to_delete(config: TrainConfig, output_dir: Path) -> None:
    """Refuse to overwrite what is no run, or what this run stands on.

    Raises:
        ConfigError: says which.
    """
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not (output_dir / CONFIG_FILE).exists():
            raise ConfigError(
                f"{output_dir} holds files but no {CONFIG_FILE} of a run, so --overwrite leaves it "
                "alone. Give another --output, or empty it yourself."
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
    """Return a run's config with the defaults of keys that are younger than the run."""
    try:
        resolved = validate(TrainConfig, old, CONFIG_FILE).resolved()
    except ConfigError:
        return old  # the keys that differ are named to the user
    return dict(yaml.safe_load(resolved.to_yaml()))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted keys in which two configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [path.lstrip(".")]
