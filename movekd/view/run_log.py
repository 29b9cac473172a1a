"""A training run as it lies on disk, running or ended: its config, its logged steps, its teachers.

Comes in: the output folder of `movekd train`. Goes out to ``report`` and ``page``.
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
    """What is known of a run.

    Attributes:
        directory: where it lies.
        config: the run, resolved.
        steps: every logged step, in order; each has ``step`` and what was logged of it.
        ending: what the Trainer said at the end (``train_runtime``, ...); empty until then.
        teachers: of each teacher that it distils from what `movekd cache ls --json` said.
    """

    directory: Path
    config: Mapping[str, Any]
    steps: Sequence[Entry]
    ending: Entry
    teachers: Sequence[Mapping[str, Any]]

    @property
    def is_ended(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.ending)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of what was logged under a name, where it was."""
        found = [(entry["step"], entry[name]) for entry in self.steps if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    def names(self, prefix: str) -> list[str]:
        """Return the logged names that begin so, sorted."""
        return sorted({name for entry in self.steps for name in entry if name.startswith(prefix)})


def read_run(directory: Path) -> RunLog:
    """Return a run that ended, or as far as its last checkpoint says.

    Raises:
        ConfigError: this is no run, or nothing was logged yet, or a file of it is damaged.
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
