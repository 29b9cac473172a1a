"""Read a training run from disk, finished or not: config, logged steps, teachers.

Input: the output folder of `movekd train`. Output: a ``RunLog``, for ``report`` and ``gradio_app``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from movekd.config import read_yaml
from movekd.errors import ConfigError
from movekd.student.checkpoint import CONFIG_FILE
from movekd.train.run_dir import LOG_FILE, TARGETS_FILE, last_checkpoint

Entry = Mapping[str, float]


@dataclass(frozen=True)
class RunLog:
    """The stored state of a run.

    Attributes:
        directory: folder of the run.
        config: its resolved config.
        steps: the logged steps, in order; each has ``step`` and the logged values.
        ending: the Trainer's final figures (``train_runtime``, ...); empty until the end.
        teachers: output of `movekd cache ls --json` for each teacher that it distils from.
    """

    directory: Path
    config: Mapping[str, Any]
    steps: Sequence[Entry]
    ending: Entry
    teachers: Sequence[Mapping[str, Any]]

    @property
    def is_ended(self) -> bool:
        """Whether the run is finished."""
        return bool(self.ending)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps and values that were logged under a name."""
        found = [(entry["step"], entry[name]) for entry in self.steps if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    def names(self, prefix: str) -> list[str]:
        """Return the logged names with a prefix, sorted."""
        return sorted({name for entry in self.steps for name in entry if name.startswith(prefix)})


def read_run(directory: Path) -> RunLog:
    """Return a finished run, or an unfinished one up to its last checkpoint.

    Raises:
        ConfigError: the folder is not a run, nothing was logged yet, or a file is damaged.
    """
    if not (directory / CONFIG_FILE).exists():
        raise ConfigError(
            f"{directory} holds no {CONFIG_FILE}; expected the --output of a `movekd train`."
        )
    log = _read_log(directory)
    if not log:
        raise ConfigError(
            f"{directory} has neither {LOG_FILE} nor a checkpoint yet; the log is written with "
            "each checkpoint (training.save_steps) and at the end. Until then: tensorboard "
            f"--logdir {directory}"
        )
    path = directory / TARGETS_FILE
    return RunLog(
        directory,
        read_yaml(directory / CONFIG_FILE),
        [entry for entry in log if "loss" in entry],
        next((entry for entry in reversed(log) if "train_runtime" in entry), {}),
        _read_json(path) if path.exists() else [],
    )


def _read_log(directory: Path) -> list[dict[str, float]]:
    if (directory / LOG_FILE).exists():
        return list(_read_json(directory / LOG_FILE))
    checkpoint = last_checkpoint(directory)
    if checkpoint is None:
        return []
    return list(_read_json(checkpoint / "trainer_state.json").get("log_history", []))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Restore it, or train again.") from None
