"""The output folder of a run: begun, gone on with, replaced, and never lost unasked.

OUTPUT/
  config.yaml       the run, every default filled in
  inputs.json       what it reads: checksums of corpus, conversations and each teacher's features
  targets.json      the teachers that it distils from, as `movekd cache ls --json` lists them
  log.json          every logged step, when the run has ended
  checkpoint-N/     Trainer's, for --resume
  runs/             TensorBoard
  model/            what this run ends with (see student.files)
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from movekd.cache.check import teacher_status
from movekd.cache.reader import FeatureCache
from movekd.config import read_yaml
from movekd.corpus.index import Corpus
from movekd.errors import ConfigError
from movekd.student.files import CONFIG_FILE
from movekd.train.config import TrainConfig
from movekd.train.trainer import CHECKPOINT_FILE

INPUTS_FILE = "inputs.json"
TARGETS_FILE = "targets.json"
LOG_FILE = "log.json"
_OF_A_RUN = (CONFIG_FILE, INPUTS_FILE, TARGETS_FILE, LOG_FILE, "runs", "model", "checkpoint-*")

_FREE_TO_CHANGE = (
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


def prepare_output(
    config: TrainConfig, output_dir: Path, *, resume: bool, overwrite: bool
) -> Path | None:
    """Return the checkpoint to go on from, or None to begin; deletes nothing yet.

    Raises:
        ConfigError: there is a run here already, or another one than the config describes, or
            something that is no run and would be overwritten.
    """
    has_run = (output_dir / CONFIG_FILE).exists()
    if int(os.environ.get("RANK", "0")) > 0:  # the first process decides, and may delete
        return last_checkpoint(output_dir) if resume and has_run else None
    if overwrite:
        _refuse_to_delete(config, output_dir)
        return None
    if not has_run:
        return None
    if not resume:
        raise ConfigError(
            f"{output_dir} holds a run already; give --resume to go on with it, --overwrite to "
            "delete it, or another --output."
        )
    old = read_yaml(output_dir / CONFIG_FILE)
    new = yaml.safe_load(config.to_yaml())
    changed = [d for d in sorted(_differences(old, new)) if not d.startswith(_FREE_TO_CHANGE)]
    if changed:
        raise ConfigError(
            f"{output_dir} was begun with another config: {', '.join(changed)} differ. Give the "
            f"old values (in {output_dir / CONFIG_FILE}), or another --output."
        )
    return last_checkpoint(output_dir)


def delete_run(output_dir: Path) -> None:
    """Delete the files of an earlier run, and no others."""
    for pattern in _OF_A_RUN:
        for path in output_dir.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def begin_output(
    output_dir: Path, config: TrainConfig, inputs: dict[str, Any], cache: FeatureCache | None
) -> None:
    """Note what this run is."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / INPUTS_FILE).write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")
    if cache is not None and config.distill is not None:
        teachers = [teacher_status(cache[n], cache.catalog) for n in config.distill.teachers]
        table = json.dumps([asdict(teacher) for teacher in teachers], indent=1) + "\n"
        (output_dir / TARGETS_FILE).write_text(table, encoding="utf-8")
    (output_dir / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")


def inputs_of(
    config: TrainConfig, corpus: Corpus, cache: FeatureCache | None, global_batch_size: int
) -> dict[str, Any]:
    """Return what tells this run's input from any other, wherever it lies."""
    paths = list(config.data.conversations)
    if not paths and corpus.conversations_path is not None and config.stage != "distill":
        paths = [corpus.conversations_path]
    inputs: dict[str, Any] = {
        "corpus": corpus.fingerprint(),
        "conversations": [_sha256(path) for path in paths if path.exists()],
        "global_batch_size": global_batch_size,
    }
    if cache is not None and config.distill is not None:
        inputs["geometry"] = cache.geometry
        for name in config.distill.teachers:
            inputs[f"features of {name}"] = cache[name].calibration.hash
    return inputs


def check_inputs(output_dir: Path, inputs: dict[str, Any]) -> None:
    """Refuse to go on with other data than a run was begun with.

    Raises:
        ConfigError: says what differs.
    """
    path = output_dir / INPUTS_FILE
    if not path.exists():  # begun before there was such a file
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(k for k in old.keys() | inputs.keys() if old.get(k) != inputs.get(k))
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is damaged; begin anew in another --output.") from None
    if "global_batch_size" in changed:
        raise ConfigError(
            f"{output_dir} was begun with {old.get('global_batch_size')} samples a step, and this "
            f"is {inputs['global_batch_size']} (processes x per_device_train_batch_size x "
            "gradient_accumulation_steps). Choose the last two so that the product is the old one."
        )
    if changed:
        raise ConfigError(
            f"{output_dir} was begun with other data: {', '.join(changed)} differ. Give the "
            "corpus and the cache that it was begun with, or another --output."
        )


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


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted keys in which two configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [path.lstrip(".")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
