"""Read a training run from disk, finished or not: config, logged steps, teachers.

Input: the output folder of `movekd train`, maybe a stranger's. Output: a ``RunLog``, for ``report``
and ``gradio_app``. What a log should not hold is left out, and the log says so.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from movekd.config import read_yaml
from movekd.errors import ConfigError, shorten
from movekd.files.reading import MIB, read_json
from movekd.student.checkpoint import CONFIG_FILE
from movekd.train.run_dir import LOG_FILE, TARGETS_FILE, last_checkpoint

Entry = Mapping[str, float]
_MAX_BYTES = 256 * MIB
_MAX_LISTED = 5
_MAX_NAMES = 4096
_MAX_STEP = 10**12
_LARGEST = 1e30
"""Larger values than this cannot be drawn; no loss reaches it."""
_HELD_OUT = "eval_"
"""Prefix of the figures of held-out samples and of a probe."""
_NAME = re.compile(r"[\w.+-]{1,100}", re.ASCII)

_Count = Annotated[int, Field(ge=0, le=10**18)]
_Share = Annotated[float, Field(ge=0, le=1e6)]
_Text = Annotated[str, Field(max_length=200)]


class TeacherRow(BaseModel):
    """What the report shows of one teacher; `movekd cache ls --json` has further keys."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    teacher: _Text
    rows: _Count
    grid: _Count
    width: _Count
    codec: _Text
    compressor: _Text
    size_bytes: _Count
    error_mean: _Share | None
    error_max: _Share | None
    skipped: _Count
    fingerprint: _Text
    random_weights: bool


@dataclass(frozen=True)
class RunLog:
    """The stored state of a run.

    Attributes:
        directory: folder of the run.
        config: its resolved config.
        steps: the logged steps, in order; each has ``step`` and the logged values.
        ending: the Trainer's final figures (``train_runtime``, ...); empty until the end.
        teachers: the teachers that it distils from.
        num_not_finite: logged values that are NaN, infinite or too large to draw: gaps in curves.
        left_out: what the files hold and the log does not, in words.
        evaluations: the logged figures of held-out samples and of a probe, in order; each has
            ``step``.
    """

    directory: Path
    config: Mapping[str, Any]
    steps: Sequence[Entry]
    ending: Entry
    teachers: Sequence[TeacherRow]
    num_not_finite: int = 0
    left_out: Sequence[str] = ()
    evaluations: Sequence[Entry] = ()

    @property
    def is_ended(self) -> bool:
        """Whether the run is finished."""
        return bool(self.ending)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps and values that were logged under a name."""
        entries = self.evaluations if name.startswith(_HELD_OUT) else self.steps
        found = [(entry["step"], entry[name]) for entry in entries if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    def names(self, prefix: str) -> list[str]:
        """Return the logged names with a prefix, sorted."""
        entries = self.evaluations if prefix.startswith(_HELD_OUT) else self.steps
        return sorted({name for entry in entries for name in entry if name.startswith(prefix)})


def read_run(directory: Path, *, may_be_empty: bool = False) -> RunLog:
    """Return a finished run, or an unfinished one up to its last checkpoint.

    Args:
        directory: folder of the run.
        may_be_empty: accept a run that has logged nothing yet.

    Raises:
        ConfigError: the folder is not a run, nothing was logged yet, or a file is damaged.
    """
    if not (directory / CONFIG_FILE).exists():
        raise ConfigError(
            f"{directory} holds no {CONFIG_FILE}; expected the --output of a `movekd train`."
        )
    config = read_yaml(directory / CONFIG_FILE)
    log, source = _read_log(directory)
    if not log and not may_be_empty:
        raise ConfigError(
            f"{directory} has neither {LOG_FILE} nor a checkpoint yet; the log is written with "
            "each checkpoint (training.save_steps) and at the end. Until then: tensorboard "
            f"--logdir {directory}"
        )
    entries, odd = _check_entries(log)
    teachers, odd_teachers = _read_teachers(directory / TARGETS_FILE)
    steps = [entry for entry in entries if "loss" in entry and "step" in entry]
    evaluations = [e for e in entries if _is_evaluation(e) and "step" in e]
    logged = [*steps, *evaluations]
    not_finite = sum(math.isnan(value) for entry in logged for value in entry.values())
    return RunLog(
        directory,
        config,
        steps,
        next((entry for entry in reversed(entries) if "train_runtime" in entry), {}),
        teachers,
        not_finite,
        [*_describe(source.name, odd), *_describe(TARGETS_FILE, odd_teachers)],
        evaluations,
    )


def _read_log(directory: Path) -> tuple[list[Any], Path]:
    """Return the entries of the log, unchecked, and the file that holds them."""
    path = directory / LOG_FILE
    if path.exists():
        return _read_list(path), path
    checkpoint = last_checkpoint(directory)
    if checkpoint is None:
        return [], path
    path = checkpoint / "trainer_state.json"
    state = read_json(path, max_bytes=_MAX_BYTES, allow_nan=True)
    log = state.get("log_history", []) if isinstance(state, dict) else None
    if not isinstance(log, list):
        raise ConfigError(f"{path} holds no log_history; expected a list of entries.")
    return log, path


def _read_list(path: Path) -> list[Any]:
    remedy = "Restore it, or train again."
    content = read_json(path, max_bytes=_MAX_BYTES, allow_nan=True, remedy=remedy)
    if not isinstance(content, list):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected a list. {remedy}")
    return content


def _check_entries(log: Sequence[Any]) -> tuple[list[dict[str, float]], Counter[str]]:
    """Return the entries with what can be drawn, and what was left out with how often."""
    odd: Counter[str] = Counter()
    names: set[str] = set()
    entries = []
    for found in log:
        if not isinstance(found, dict):
            odd[f"entry {shorten(found, 40)}"] += 1
            continue
        entry = {}
        for name, value in found.items():
            number = _number(value)
            is_known = name in names or (len(names) < _MAX_NAMES and _NAME.fullmatch(name))
            if number is None or not is_known or not _fits(name, number):
                odd[f"{shorten(name, 40)}: {shorten(value, 40)}"] += 1
                continue
            names.add(name)
            entry[name] = number
        if ("loss" in entry or _is_evaluation(entry)) and "step" not in entry:
            odd["entry without a step"] += 1
        entries.append(entry)
    return entries, odd


def _is_evaluation(entry: Entry) -> bool:
    """Return whether an entry holds figures of held-out samples or of a probe."""
    return "loss" not in entry and any(name.startswith(_HELD_OUT) for name in entry)


def _number(value: Any) -> float | None:
    """Return a logged value; NaN for one that cannot be drawn, None for one that is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if abs(number) <= _LARGEST else math.nan


def _fits(name: str, value: float) -> bool:
    """Return whether a value can be what its name says; ``_LARGEST`` holds for all."""
    if name == "step":
        return 0 <= value <= _MAX_STEP
    if name in ("epoch", "train_runtime", "train_samples_per_second"):
        return 0 <= value <= 1e9  # 30 years in seconds
    return True


def _read_teachers(path: Path) -> tuple[list[TeacherRow], Counter[str]]:
    odd: Counter[str] = Counter()
    rows = []
    for number, found in enumerate(_read_list(path) if path.exists() else []):
        try:
            rows.append(TeacherRow.model_validate(found))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            odd[f"teacher {number}, {shorten(where, 40)}: {shorten(first['msg'], 80)}"] += 1
    return rows, odd


def _describe(name: str, odd: Counter[str]) -> list[str]:
    """Return in one line what of a file was left out."""
    if not odd:
        return []
    listed = [
        text + (f" ({count} times)" if count > 1 else "")
        for text, count in odd.most_common(_MAX_LISTED)
    ]
    more = len(odd) - len(listed)
    return [f"{name}: {'; '.join(listed)}" + (f"; and {more} more" if more else "")]
