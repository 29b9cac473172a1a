"""Group training runs into arms: runs of one arm differ in their seeds only.

Input: folders of runs, each maybe with the name of its arm. Output: ``Arm`` objects, and the keys
of student.yaml in which they differ. Compared are the resolved configs, without seeds, without keys
that change no model (logging, workers), with checksums in place of the paths of data, and with the
config of the earlier stage in place of ``init_from``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from movekd.errors import ConfigError, shorten
from movekd.student.checkpoint import CONFIG_FILE, read_run_config
from movekd.train.fingerprints import read_inputs
from movekd.train.run_dir import CHANGEABLE_KEYS, with_new_keys
from movekd.train.run_record import is_training
from movekd.view.run_log import RunLog, read_run

State = Literal["finished", "training", "interrupted"]
Nested = Mapping[str, Any]
SAMPLES_PER_STEP = "samples per step"
FEATURES_OF = "features of "
"""Start of the names of the teachers' checksums in inputs.json."""
_DATA_KEYS = {
    "corpus": "shards",
    "conversations": "conversations",
    "held-out conversations": "eval_conversations",
    "probe images": "probe_images",
}
"""Checksum in inputs.json -> the key of ``data`` whose path it replaces."""
_SEEDS = ("seed", "data_seed")
_MOST_STAGES = 8
_MOST_CHARACTERS = 60
_EARLIER = "init_from."
_CHECKSUM = re.compile("[0-9a-f]{64}")
_SECTION, _UNSET, _NONE = "given", "not set", "-"
"""Cells of a section, of a key that is left to its default, and of one whose section is missing."""


@dataclass(frozen=True)
class ComparedRun:
    """A run, and what of it may differ between runs.

    Attributes:
        log: its log; no steps if nothing was logged yet.
        arm: name of its arm, if the user gave one.
        state: whether it has ended, trains now, or was interrupted.
        seed: seeds of the run and of the stages before it, in words; runs are paired by it.
        keys: its config as the module compares it.
        inputs: inputs.json; None where an older version wrote none.
    """

    log: RunLog
    arm: str | None
    state: State
    seed: str
    keys: Nested
    inputs: Nested | None

    @property
    def folder(self) -> str:
        """Folder of the run, as it was given."""
        return str(self.log.directory)

    @property
    def samples_per_step(self) -> int | None:
        """Samples of one optimizer step (rows, if they are packed); None if it is unknown."""
        return None if self.inputs is None else self.inputs.get("global_batch_size")

    @property
    def num_steps(self) -> float:
        """Optimizer steps up to the last logged one."""
        logged = [*self.log.steps, *self.log.evaluations]
        ends = [self.log.ending.get("step", 0.0), *(entry["step"] for entry in logged)]
        return max(ends)

    @property
    def num_samples(self) -> float | None:
        """Samples seen, repeated ones included; None if it is unknown."""
        per_step = self.samples_per_step
        return None if per_step is None else self.num_steps * per_step

    @cached_property
    def signature(self) -> str:
        """Text that is equal for runs that differ in their seeds only."""
        return json.dumps(self.keys, sort_keys=True, default=str)


@dataclass(frozen=True)
class Arm:
    """Runs that are compared as one.

    Attributes:
        name: given by the user, or the keys in which the arm differs from the others.
        runs: its runs, ordered by seed and folder.
        cells: its value of each key of ``differing_keys``, in order.
        mixed: keys in which its runs differ, although they have one name.
    """

    name: str
    runs: Sequence[ComparedRun]
    cells: Sequence[str]
    mixed: Sequence[str] = ()

    @property
    def finished(self) -> list[ComparedRun]:
        """The runs whose figures count."""
        return [run for run in self.runs if run.state == "finished"]


def read_compared(given: str) -> ComparedRun:
    """Return a run from ``FOLDER`` or ``NAME=FOLDER``.

    Raises:
        ConfigError: the folder is not a run, or a file is damaged.
    """
    name, separator, place = given.partition("=")
    is_named = bool(separator and name and not Path(given).exists())
    directory = Path(place if is_named else given)
    log = read_run(directory, may_be_empty=True)
    config, inputs = read_run_config(directory / CONFIG_FILE), read_inputs(directory)
    state: State = "finished"
    if not log.is_ended:
        state = "training" if is_training(directory) else "interrupted"
    seeds = _seeds(config)
    keys = _compared_keys(config, inputs)
    said = seeds[0] if len(set(seeds)) == 1 else " after ".join(seeds)
    return ComparedRun(log, name if is_named else None, state, said, keys, inputs)


def group_runs(runs: Sequence[ComparedRun]) -> tuple[list[str], list[Arm]]:
    """Return the keys in which arms differ, and the arms in the order of their first runs.

    Raises:
        ConfigError: an arm holds one folder twice.
    """
    found: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in runs:
        key = ("", run.signature) if run.arm is None else (run.arm, "")
        found.setdefault(key, []).append(run)
    for group in found.values():
        _refuse_repeated(group)
    groups = [sorted(group, key=lambda run: (run.seed, run.folder)) for group in found.values()]
    rows = _differing(groups)
    arms: list[Arm] = []
    for number, ((given, _), group) in enumerate(zip(found, groups, strict=True)):
        cells = [cells[number] for _, cells in rows]
        name = given or _name([key for key, _ in rows], cells) or group[0].log.directory.name
        taken = {arm.name for arm in arms}
        unique = name if name not in taken else f"{name} ({number + 1})"
        mixed = [key for key, _ in _differing([[run] for run in group])]
        arms.append(Arm(unique, group, cells, mixed))
    return [key for key, _ in rows], arms


def lookup(keys: Nested, dotted: str) -> Any:
    """Return the value of a dotted key of a nested config; None if it has none."""
    found: Any = keys
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _refuse_repeated(runs: Sequence[ComparedRun]) -> None:
    places = [run.log.directory.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(
                f"{run.folder} is given twice; expected each run once. Leave one out, or name "
                f"two arms (a={run.folder} b={run.folder}) to compare a run with itself."
            )


def _seeds(config: Nested, depth: int = _MOST_STAGES) -> list[str]:
    """Return the seeds of a run and of the stages before it, the last stage first."""
    training = config.get("training") or {}
    seed, data_seed = (training.get(key) for key in _SEEDS)
    seed = TrainingArguments.seed if seed is None else seed
    own = str(seed) if data_seed in (None, seed) else f"{seed} (data {data_seed})"
    earlier = _read_earlier(config)
    rest = [] if earlier is None or not depth else _seeds(earlier[0], depth - 1)
    return [shorten(own, 40), *rest]


def _compared_keys(config: Nested, inputs: Nested | None, depth: int = _MOST_STAGES) -> Nested:
    """Return a config as it is compared, with the stages before it inside."""
    keys = with_new_keys(dict(config))
    training = keys.get("training") or {}
    keys["training"] = {
        key: value
        for key, value in training.items()
        if key not in _SEEDS and not f"training.{key}".startswith(CHANGEABLE_KEYS)
    }
    data, features = dict(keys.get("data") or {}), {}
    for name, value in (inputs or {}).items():
        if name in _DATA_KEYS:
            data[_DATA_KEYS[name]] = value
        elif name == "weights":  # the paths of the sources are no difference
            data["sources"] = {"weight": value}
        elif name == "global_batch_size":
            keys[SAMPLES_PER_STEP] = value
        elif name.startswith(FEATURES_OF):
            features[name] = value
    if features:
        keys["distill"] = (keys.get("distill") or {}) | features
    earlier = _read_earlier(config)
    if earlier is not None and depth:
        keys["init_from"] = _compared_keys(*earlier, depth - 1)
    named: Nested = _named(keys | {"data": data})
    return named


def _named(value: Any) -> Any:
    """Return a value of a config with texts for all keys; a stranger's YAML may have others."""
    if isinstance(value, Mapping):
        return {str(key): _named(inner) for key, inner in value.items()}
    return value


def _read_earlier(config: Nested) -> tuple[Nested, Nested | None] | None:
    """Return config and inputs of the run of ``init_from``; None if it cannot be read."""
    place = config.get("init_from")
    if not isinstance(place, str) or not place or "\0" in place:
        return None
    try:
        return read_run_config(Path(place) / CONFIG_FILE), read_inputs(Path(place))
    except ConfigError:
        return None


def _differing(groups: Sequence[Sequence[ComparedRun]]) -> list[tuple[str, list[str]]]:
    """Return the dotted keys in which groups of runs differ, each with a cell per group.

    A key below a section that a group does not have, such as ``distill: null``, does not count.
    """
    flat = [[_flatten(run.keys) for run in group] for group in groups]
    rows = []
    for key in sorted({key for group in flat for run in group for key in run}):
        found = [sorted({cell for run in g if (cell := _cell_at(run, key))}) for g in flat]
        cells = [" | ".join(texts) for texts in found]
        if len(set(filter(None, cells))) > 1:
            rows.append((key, [cell or _NONE for cell in cells]))
    own = dict(rows)  # a key that differs in both stages alike is listed once
    return [(k, cells) for k, cells in rows if own.get(_own_key(k)) != cells or _own_key(k) == k]


def _own_key(key: str) -> str:
    """Return the key of the run itself for one of a stage before it."""
    while key.startswith(_EARLIER):
        key = key.removeprefix(_EARLIER)
    return key


def _flatten(keys: Nested, path: str = "") -> dict[str, str]:
    """Return the cell of each dotted key, sections included."""
    cells = {}
    for key, value in keys.items():
        cells[f"{path}{key}"] = _cell(value)
        if isinstance(value, Mapping):
            cells |= _flatten(value, f"{path}{key}.")
    return cells


def _cell_at(flat: Mapping[str, str], key: str) -> str | None:
    """Return the cell of a run's key; None if the run has not even the section of the key."""
    section = key.rpartition(".")[0]
    has_section = not section or flat.get(section) == _SECTION
    return flat.get(key, _UNSET) if has_section else None


def _cell(value: Any) -> str:
    """Return a value as the table shows it."""
    if isinstance(value, Mapping):
        return _SECTION
    if isinstance(value, list):
        return shorten(", ".join(map(_cell, value)) or "[]", _MOST_CHARACTERS)
    if isinstance(value, str) and _CHECKSUM.fullmatch(value):
        return value[:8]
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return shorten(value, _MOST_CHARACTERS)


def _name(keys: Sequence[str], cells: Sequence[str]) -> str:
    """Return an arm's values of the keys in which arms differ, as a name."""
    said = {key: cell for key, cell in zip(keys, cells, strict=True) if cell != _NONE}
    telling = {key: cell for key, cell in said.items() if cell not in (_SECTION, _UNSET)}
    parts = [f"{key.rpartition('.')[2]}={cell}" for key, cell in (telling or said).items()]
    return shorten(", ".join(dict.fromkeys(parts)), 80)
