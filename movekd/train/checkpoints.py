"""The checkpoints of a run: written whole or not at all, checked before a resume, rotated.

    OUTPUT/.movekd-partial/     what is being written
    OUTPUT/checkpoint-N/        a checkpoint; its record lists every file with its checksum
    OUTPUT/checkpoint-N.damaged a damaged one that a resume passed over

Input: a run directory. Output: the newest checkpoint that is whole, and why newer ones are not. A
checkpoint gets its name when all its files and its record are on disk. Checkpoints of older
versions have no record; for them the checksums inside the files count as far as these exist.
"""

import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from movekd.errors import ConfigError, MovekdError, TrainingError, shorten
from movekd.files.ownership import (
    OWNERSHIP_FILE,
    OwnedFiles,
    changes,
    delete_owned,
    fsync,
    read_owned,
    write_owned,
)
from movekd.files.reading import MIB, read_json

CHECKPOINT_FILE = "trained.safetensors"
STATE_FILE = "trainer_state.json"
PARTIAL_DIR = ".movekd-partial"
MADE_BY = "movekd train"
_MAX_STATE_BYTES = 1024 * MIB  # it holds the whole log
_NEEDED = {
    "the weights": (CHECKPOINT_FILE, "pytorch_model_fsdp*"),
    "the state of the optimizer": ("optimizer*", "global_step*/*optim_states.pt"),
    "the state of the scheduler": ("scheduler.pt",),
    "the state of the random numbers": ("rng_state*.pth",),
}
"""What a resume needs to end as an uninterrupted run -> names of its files (DeepSpeed's last)."""


class _State(BaseModel):
    """The numbers of ``trainer_state.json`` that a resume starts from."""

    global_step: Annotated[int, Field(ge=1, strict=True)]
    max_steps: Annotated[int, Field(ge=1, strict=True)]
    epoch: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    log_history: list[dict[str, Any]]
    stateful_callbacks: dict[str, Any]


class Found(NamedTuple):
    """The checkpoints of a run, as ``find_whole`` has checked them."""

    whole: Path | None
    """The newest whole one."""
    damaged: dict[Path, str]
    """Newer ones -> what is wrong; all of them if none is whole."""

    def describe(self) -> str:
        """Return which are damaged, and how."""
        said = [f"{path.name} is damaged ({why})" for path, why in self.damaged.items()]
        rest = f" and {len(said) - 3} more" if len(said) > 3 else ""
        return f"{', '.join(said[:3])}{rest}"


def numbered_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Return step and folder of every checkpoint, damaged ones too, the newest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        if (number := re.fullmatch(r"checkpoint-(\d{1,18})", path.name)) and path.is_dir():
            found.append((int(number[1]), path))
    return sorted(found, reverse=True)


def find_whole(output_dir: Path) -> Found:
    """Return the newest whole checkpoint of a run; reads every byte of it."""
    damaged: dict[Path, str] = {}
    for step, path in numbered_checkpoints(output_dir):
        why = _damage(path, step)
        if why is None:
            return Found(path, damaged)
        damaged[path] = why
    return Found(None, damaged)


def require_checkpoint(output_dir: Path, step: int) -> Path:
    """Return the checkpoint of a step; reads every byte of it.

    Raises:
        TrainingError: it is gone or damaged.
    """
    path = output_dir / f"checkpoint-{step}"
    why = _damage(path, step) if path.is_dir() else "gone"
    if why is not None:
        raise TrainingError(
            f"{path}, the checkpoint of the step with the smallest held-out loss, is not whole "
            f"({why}). Restore it, or start again in another --output."
        )
    return path


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint whose log can be read, or None. Compares no checksum."""
    for _, path in numbered_checkpoints(output_dir):
        try:
            read_json(path / STATE_FILE, max_bytes=_MAX_STATE_BYTES, allow_nan=True)
        except MovekdError:
            continue
        if _has_any(path, _NEEDED["the weights"]):
            return path
    return None


def continue_hint(output_dir: Path) -> str:
    """Return how to continue a run that stops now: from a checkpoint, if it has saved one."""
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        return "No checkpoint was saved yet, so --resume starts from the beginning."
    return f"{checkpoint.name} stays; --resume continues from it."


def has_record(checkpoint: Path) -> bool:
    """Return whether a checkpoint has checksums; those of older versions have none."""
    return (checkpoint / OWNERSHIP_FILE).exists()


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again; return its new path."""
    number = 1
    while os.path.lexists(aside := checkpoint.with_name(_aside_name(checkpoint.name, number))):
        number += 1
    checkpoint.rename(aside)
    return aside


def publish(partial: Path, output_dir: Path) -> None:
    """Give a written checkpoint its record and its name, durably."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in [*files, *(path for path in partial.rglob("*") if path.is_dir())]:
        fsync(path)
    write_owned(partial, [path.relative_to(partial).as_posix() for path in files], MADE_BY)
    final = output_dir / partial.name
    if os.path.lexists(final):
        set_aside(final)
    partial.rename(final)
    fsync(output_dir)


def rotate(output_dir: Path, limit: int | None, *, kept_step: int | None = None) -> None:
    """Delete the files of all but the newest ``limit`` whole checkpoints; None or 0 keeps all.

    Damaged ones do not count, and what has no record stays, like the checkpoint of ``kept_step``.
    """
    if not limit or limit < 0:
        return
    num_whole = 0
    for step, path in numbered_checkpoints(output_dir):
        try:
            owned = read_owned(path)
        except ConfigError:
            continue
        if owned is None or step == kept_step:
            continue
        if num_whole == limit:  # by size: reading tens of GB again would stop the run
            delete_checkpoint(path, owned, by_size=True)
        elif not changes(path, owned, by_size=True):
            num_whole += 1


def delete_checkpoint(path: Path, owned: OwnedFiles, *, by_size: bool = False) -> None:
    """Delete the files of a checkpoint that are as recorded, and the folder if it is empty then."""
    delete_owned(path, owned, by_size=by_size)
    with suppress(OSError):
        path.rmdir()


def remove_partial(output_dir: Path) -> None:
    """Remove what a killed process had not finished writing."""
    partial = output_dir / PARTIAL_DIR
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)


@contextmanager
def writing(what: str, output_dir: Path) -> Iterator[None]:
    """Turn a failed write, say on a full disk, into a sentence; leave no half of ``what``.

    Raises:
        TrainingError: names what could not be written, why, and what stays.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        is_torchs = isinstance(error, RuntimeError)  # which does not say why it cannot write
        if is_torchs and not re.search("PytorchStreamWriter|inline_container", str(error)):
            raise
        shutil.rmtree(output_dir / PARTIAL_DIR, ignore_errors=True)
        why = "a write failed" if is_torchs else getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"{what} cannot be written to {output_dir}: {shorten(why)}; expected room on the disk "
            f"and the right to write. {continue_hint(output_dir)}"
        ) from None


def _damage(path: Path, step: int) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is whole."""
    try:
        owned = read_owned(path)
        if owned is not None and (changed := changes(path, owned)):
            name, change = next(iter(changed.items()))
            more = f", {len(changed) - 1} more files" if len(changed) > 1 else ""
            return f"{shorten(name, 80)} {change}{more}"
        for what, names in _NEEDED.items():
            if not _has_any(path, names):
                return f"{what} is missing ({names[0]})"
        if wrong := _wrong_state(path / STATE_FILE, step):
            return wrong
        return _wrong_content(path) if owned is None else None
    except ConfigError:
        return f"{OWNERSHIP_FILE} of other content"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _wrong_state(path: Path, step: int) -> str | None:
    try:
        content = read_json(path, max_bytes=_MAX_STATE_BYTES, allow_nan=True)
        state = _State.model_validate(content)
        TrainerState(**content)
    except (MovekdError, ValidationError, TypeError):
        return f"{STATE_FILE} cannot be read"
    if state.global_step != step or state.global_step > state.max_steps:
        return f"{STATE_FILE} says step {state.global_step} of {state.max_steps}"
    return None


def _wrong_content(path: Path) -> str | None:
    """Return which file of a checkpoint without a record cannot be whole."""
    for file in sorted(path.rglob("*")):
        if file.suffix not in (".pt", ".pth", ".safetensors", ".distcp") or file.is_dir():
            continue
        if not stat.S_ISREG(file.stat().st_mode) or file.stat().st_size == 0:
            return f"{shorten(file.name, 80)} is empty or no regular file"
        try:
            if file.suffix in (".pt", ".pth"):  # torch's zip files have a checksum per member
                with zipfile.ZipFile(file) as members:
                    if members.testzip() is not None:
                        return f"{shorten(file.name, 80)} of other content"
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        if not torch.isfinite(tensors.get_tensor(name)).all():
                            return f"{shorten(name, 80)} is not finite"
        except (zipfile.BadZipFile, zlib.error, SafetensorError, ValueError, RuntimeError):
            return f"{shorten(file.name, 80)} cannot be read"
    return None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any(path for name in names for path in folder.glob(name))


def _aside_name(name: str, number: int) -> str:
    return f"{name}.damaged" if number == 1 else f"{name}.damaged-{number}"
