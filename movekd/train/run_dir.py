"""Create, resume or overwrite a run directory.

OUTPUT/
  config.yaml         the run, with every default filled in
  inputs.json         checksums of corpus, conversations and each teacher's features
  launches.json       the launches of torchrun that have worked on the run
  targets.json        the teachers that it distils from, as `movekd cache ls --json` lists them
  log.json            every logged step, when the run has ended
  checkpoint-N/       checkpoints of transformers' Trainer, for --resume (see checkpoints)
  runs/               TensorBoard
  model/              the trained parts (see student.checkpoint)
  .movekd-files.json  the files that the run wrote (see run_record)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from movekd import distributed
from movekd.cache.verify import TeacherStatus
from movekd.config import validate
from movekd.distill.config import NEWER_KEYS
from movekd.errors import ConfigError, TrainingError
from movekd.files.reading import MIB, read_json
from movekd.student.checkpoint import CONFIG_FILE, read_run_config
from movekd.train.checkpoints import (
    find_whole,
    has_record,
    last_checkpoint,
    set_aside,
)
from movekd.train.config import TrainConfig
from movekd.train.fingerprints import INPUTS_FILE, read_inputs
from movekd.train.run_record import (
    LAUNCHES_FILE,
    LOG_FILE,
    TARGETS_FILE,
    delete_run,
    describe_files,
    remove_unfinished,
    require_deletable,
    require_free,
    write_recorded,
)

__all__ = [
    "CHANGEABLE_KEYS",
    "LOG_FILE",
    "TARGETS_FILE",
    "RunStart",
    "is_restart",
    "last_checkpoint",
    "plan_start",
    "prepare_run",
    "with_new_keys",
    "write_run_files",
]

CHANGEABLE_KEYS = (
    "training.dataloader_num_workers",
    "training.dataloader_pin_memory",
    "training.dataloader_prefetch_factor",
    "training.disable_tqdm",
    "training.eval_",
    "training.per_device_eval_batch_size",
    "training.logging_",
    "training.report_to",
    "training.run_name",
    "training.save_",
    "training.gradient_accumulation_steps",  # these two: global_batch_size is compared
    "training.per_device_train_batch_size",
)
"""Keys, or prefixes of keys, that a resume may change: the trained model stays the same."""
_BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class RunStart:
    """How a run starts.

    Attributes:
        checkpoint: whole checkpoint to resume from; None: start from the beginning.
        samples: samples per step to keep, of a resumed run; None: as the config says.
        is_overwriting: whether to delete the files of an earlier run first.
        damaged: newer checkpoints, which are damaged and make way.
        notes: what a user should know, a line each.
    """

    checkpoint: Path | None
    samples: int | None
    is_overwriting: bool
    damaged: tuple[Path, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


def plan_start(
    config: TrainConfig,
    output_dir: Path,
    launches: Sequence[str | None] = (),
    *,
    resume: bool,
    overwrite: bool,
    force: bool = False,
) -> RunStart:
    """Return how the run in a folder starts; this deletes nothing yet.

    Args:
        config: the resolved run.
        output_dir: its folder.
        launches: the ``launch_id`` of every rank. A restart by torchrun resumes the run, whatever
            the next two say.
        resume: continue the run in the folder.
        overwrite: replace it.
        force: with ``overwrite``, delete also files that are not provably of the run.

    Raises:
        ConfigError: the flags contradict each other; the folder holds a run and no flag is given,
            or a run of another config, or files that are not a run's and would be overwritten.
        TrainingError: a resume finds checkpoints, and none of them is whole.
    """
    if overwrite and resume:
        raise ConfigError(
            "--resume continues the run in a folder and --overwrite deletes it; give one of them."
        )
    if force and not overwrite:
        raise ConfigError("--force only belongs to --overwrite; give both, or leave it out.")
    if is_restart(output_dir, launches):
        resume, overwrite = True, False
    if overwrite:
        _refuse_to_delete(config, output_dir, force)
        return RunStart(None, None, True)
    if not (output_dir / CONFIG_FILE).exists():
        require_free(output_dir)
        note = f"{output_dir} holds no run to resume: it starts from the beginning."
        return RunStart(None, None, False, notes=(note,) if resume else ())
    if not resume:
        raise ConfigError(
            f"{output_dir} holds a run already; give --resume to continue it, --overwrite to "
            "delete it, or another --output."
        )
    old = with_new_keys(read_run_config(output_dir / CONFIG_FILE))
    new = yaml.safe_load(config.to_yaml())
    changed = [d for d in sorted(_differences(old, new)) if not d.startswith(CHANGEABLE_KEYS)]
    if changed:
        raise ConfigError(
            f"{output_dir} was begun with another config: {describe_files(changed)} differ. Give "
            f"the old values (in {output_dir / CONFIG_FILE}), or another --output."
        )
    found = find_whole(output_dir)
    if found.whole is None and found.damaged:
        raise TrainingError(
            f"{output_dir} holds no whole checkpoint to resume from: {found.describe()}. Restore "
            "one, or move them away to start from the beginning with --resume."
        )
    notes = []
    if found.whole is None:
        notes = [f"{output_dir} holds no checkpoint yet: it starts from the beginning."]
    elif found.damaged:
        notes = [f"{found.describe()}; resuming from {found.whole.name}."]
    if found.whole is not None and not has_record(found.whole):
        notes.append(
            f"{found.whole.name} has no checksums (an older version of movekd wrote it); resuming "
            "from it as it is."
        )
    samples = _samples_to_keep(old, config, output_dir)
    return RunStart(found.whole, samples, False, tuple(found.damaged), tuple(notes))


def prepare_run(output_dir: Path, start: RunStart, *, force: bool = False) -> list[str]:
    """Make the folder ready for a run that has passed all checks; return lines for the user.

    Deletes the earlier run, or renames the damaged checkpoints of this one.
    """
    remove_unfinished(output_dir)
    lines = [*start.notes]
    for path in filter(Path.is_dir, start.damaged):  # a node may have none of another's
        lines.append(f"{path.name} is now {set_aside(path).name}; delete it if you do not need it.")
    if (
        start.is_overwriting
        and output_dir.is_dir()
        and (left := delete_run(output_dir, force=force))
    ):
        lines.append(
            f"{output_dir} keeps what `movekd train` did not write: {describe_files(left)}."
        )
    return lines


def is_restart(output_dir: Path, launches: Sequence[str | None]) -> bool:
    """Return whether torchrun started the run in a folder and now restarts its processes.

    Nodes may join and leave, but ``launches`` of all ranks still holds one launch that has worked
    on the run. Without torchrun's folder, its restart count decides.
    """
    if not any(launches):
        return distributed.num_restarts() > 0
    return not _launches(output_dir).isdisjoint(launches)


def write_run_files(
    output_dir: Path,
    config: TrainConfig,
    inputs: dict[str, Any],
    launches: Sequence[str | None] = (),
    teachers: Sequence[TeacherStatus] = (),
) -> None:
    """Write the files that describe a run: config, inputs, teachers and launches."""
    known = sorted({name for name in launches if name} | _launches(output_dir))
    table = json.dumps([asdict(teacher) for teacher in teachers], indent=1)
    contents = {
        LAUNCHES_FILE: json.dumps(known) + "\n",  # first: a restart must find it
        INPUTS_FILE: json.dumps(inputs, indent=1) + "\n",
        TARGETS_FILE: table + "\n",
        CONFIG_FILE: config.to_yaml(),
    }
    if not known:
        del contents[LAUNCHES_FILE]
    write_recorded(output_dir, contents)


def _samples_to_keep(old: dict[str, Any], config: TrainConfig, output_dir: Path) -> int | None:
    """Return the samples per step of a run so far; None if the config's batch keys changed."""
    before = old.get("training") or {}
    if any(before.get(key) != config.training.get(key) for key in _BATCH_KEYS):
        return None
    inputs = read_inputs(output_dir)  # None: an older run, or one killed at its start
    return None if inputs is None else inputs.get("global_batch_size")


def _launches(output_dir: Path) -> set[str]:
    """Return the launches of torchrun that have worked on the run in a folder."""
    path = output_dir / LAUNCHES_FILE
    if not path.exists():
        return set()
    remedy = "Restore it; or remove it, if no torchrun is about to restart this run."
    launches = read_json(path, max_bytes=MIB, remedy=remedy)
    if not isinstance(launches, list) or not all(isinstance(name, str) for name in launches):
        raise ConfigError(f"{path} is damaged; expected a list of names. {remedy}")
    return set(launches)


def _refuse_to_delete(config: TrainConfig, output_dir: Path, force: bool) -> None:
    """Refuse to overwrite a folder that is not a run, or the run that ``init_from`` names."""
    require_deletable(output_dir, force=force)
    if config.init_from is not None and output_dir.resolve() in (
        config.init_from.resolve(),
        *config.init_from.resolve().parents,
    ):
        raise ConfigError(
            f"--overwrite would delete {output_dir}, and init_from {config.init_from} lies "
            "there; give another --output."
        )


def with_new_keys(old: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config with defaults for keys that are newer than the run."""
    if isinstance(old.get("distill"), dict):  # a recipe's later default is not the old run's
        old = old | {"distill": NEWER_KEYS | old["distill"]}
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
