"""The record of what a run wrote into its directory, the lock of it, and what --overwrite deletes.

Input: a run directory. Output: ``.movekd-files.json`` in it, with the checksum of every file of the
run except checkpoints, which have their own; ``.movekd-train.lock`` while a run lives. Files that
are not as recorded, or not recorded, belong to somebody else: --overwrite keeps them.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from movekd.config import read_yaml
from movekd.errors import ConfigError, shorten
from movekd.files.lock import hold_lock, is_held
from movekd.files.ownership import (
    OWNERSHIP_FILE,
    OwnedFile,
    OwnedFiles,
    changes,
    content_entry,
    delete_owned,
    file_entry,
    fsync,
    read_owned,
    write_durably,
    write_owned,
)
from movekd.student.checkpoint import ADAPTERS_FILE, CONFIG_FILE, PART_FILES
from movekd.student.language_lora import LORA_CONFIG_FILE, LORA_FILE
from movekd.train.checkpoints import (
    MADE_BY,
    PARTIAL_DIR,
    delete_checkpoint,
    numbered_checkpoints,
    remove_partial,
)
from movekd.train.fingerprints import INPUTS_FILE

LAUNCHES_FILE = "launches.json"
LOG_FILE = "log.json"
TARGETS_FILE = "targets.json"
LOCK_FILE = ".movekd-train.lock"
MODEL_DIR = "model"
CURVES_DIR = "runs"
_START_FILES = (LAUNCHES_FILE, INPUTS_FILE, TARGETS_FILE)
"""Files of a run that may have been killed before it wrote its config.yaml."""
_WRITTEN = (
    *(*_START_FILES, CONFIG_FILE, LOG_FILE, f"{MODEL_DIR}/{CONFIG_FILE}"),
    *(f"{MODEL_DIR}/{name}" for name in (*PART_FILES.values(), ADAPTERS_FILE)),
    *(f"{MODEL_DIR}/{name}" for name in (LORA_FILE, LORA_CONFIG_FILE)),
)
"""Names that a run writes to, whatever lies there."""


@contextmanager
def lock_run(output_dir: Path) -> Iterator[None]:
    """Be the only training in a folder. The lock of a process that died is free.

    Raises:
        ConfigError: another training holds it; names process and host.
    """

    def refusal(holder: str) -> ConfigError:
        return ConfigError(
            f"{output_dir} is in use by another `movekd train` ({shorten(holder)}); expected no "
            "other one. Wait until it has ended, or give another --output."
        )

    is_new = not output_dir.exists()
    try:
        with hold_lock(output_dir / LOCK_FILE, refusal):
            yield
    finally:
        if is_new:  # nothing of a run that was refused stays
            with contextlib.suppress(OSError):
                output_dir.rmdir()


def is_training(output_dir: Path) -> bool:
    """Return whether a process trains in a folder now."""
    return is_held(output_dir / LOCK_FILE)


def write_recorded(output_dir: Path, contents: Mapping[str, str]) -> None:
    """Write text files of a run, each whole or not at all; the record names them first.

    Args:
        output_dir: the run directory.
        contents: name -> text.
    """
    raw = {name: text.encode() for name, text in contents.items()}
    _record(output_dir, {name: content_entry(content) for name, content in raw.items()})
    for name, content in raw.items():
        write_durably(output_dir / name, content)


def publish_model(partial: Path, output_dir: Path) -> None:
    """Move the files of a written model to ``OUTPUT/model``; the record names them first."""
    written = (path for path in partial.rglob("*") if path.is_file())
    names_inside = [path.relative_to(partial).as_posix() for path in written]
    write_owned(partial, names_inside, MADE_BY)  # goes with a copy of the model
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    names = {path: f"{MODEL_DIR}/{path.relative_to(partial).as_posix()}" for path in files}
    _record(output_dir, {name: file_entry(path) for path, name in names.items()})
    for path in files:
        fsync(path)
    for path, name in names.items():
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, output_dir / name)


def remove_unfinished(output_dir: Path) -> None:
    """Remove what a killed run had not finished writing."""
    remove_partial(output_dir)
    for path in _unfinished_files(output_dir):
        path.unlink()
    for _, checkpoint in numbered_checkpoints(output_dir):
        with contextlib.suppress(OSError):  # killed between its last file and the folder
            checkpoint.rmdir()


def _unfinished_files(output_dir: Path) -> list[Path]:
    """Return the temporary files of ``write_durably`` that a killed run left."""
    names = (*_START_FILES, CONFIG_FILE, LOG_FILE, OWNERSHIP_FILE)
    return [path for name in names for path in output_dir.glob(f".{name}.[0-9]*.tmp")]


def curve_files(output_dir: Path) -> set[Path]:
    """Return the files of TensorBoard in a run directory."""
    return {path for path in (output_dir / CURVES_DIR).rglob("events.*") if path.is_file()}


def record_curves(output_dir: Path, before: set[Path]) -> None:
    """Record the files of TensorBoard that this run has opened, by what they begin with.

    Args:
        output_dir: the run directory.
        before: those that were there before.
    """
    new = curve_files(output_dir) - before
    entries = {
        path.relative_to(output_dir).as_posix(): file_entry(path, path.stat().st_size)
        for path in new
        if path.stat().st_size
    }
    if entries:
        _record(output_dir, entries)


def require_free(output_dir: Path) -> None:
    """Refuse to start a run where files lie that it would overwrite or take for its own.

    Raises:
        ConfigError: names them.
    """
    known = _read_record(output_dir)
    ours = {} if known is None else {n: e for n, e in known.files.items() if n in _START_FILES}
    foreign = changes(output_dir, OwnedFiles(made_by=MADE_BY, files=ours))
    taken = [
        name
        for name in _WRITTEN
        if os.path.lexists(output_dir / name) and (name not in ours or name in foreign)
    ]
    taken += [path.name for _, path in numbered_checkpoints(output_dir)]
    if taken:
        raise ConfigError(
            f"{output_dir} holds no {CONFIG_FILE} of a run, but {describe_files(taken)}, which a "
            "run would write itself. Give another --output, or move them away."
        )


def require_deletable(output_dir: Path, *, force: bool) -> None:
    """Refuse to overwrite a folder that is no run, or files that are not provably of the run.

    Args:
        output_dir: the run directory.
        force: accept runs without a record, and files that have changed since.

    Raises:
        ConfigError: names what would be lost.
    """
    if not output_dir.is_dir():
        return
    ignored = {LOCK_FILE, PARTIAL_DIR, *(path.name for path in _unfinished_files(output_dir))}
    if not {path.name for path in output_dir.iterdir()} - ignored:
        return
    owned = _read_or_none(output_dir) if force else _read_record(output_dir)
    if owned is None and not _is_run(output_dir):
        raise ConfigError(
            f"{output_dir} holds files but no {CONFIG_FILE} of a run, so --overwrite does not "
            "delete it. Give another --output, or empty it yourself."
        )
    unproven = [] if force else _unproven(output_dir, owned)
    if unproven and owned is None:
        raise ConfigError(
            f"{output_dir} has no record of the files that its run wrote (an older version of "
            f"movekd made it), so --overwrite deletes nothing. Give --force to delete "
            f"{describe_files(unproven)}, or give another --output."
        )
    if unproven:
        raise ConfigError(
            f"--overwrite would delete {describe_files(unproven)} in {output_dir}, which `movekd "
            "train` did not write or which has changed since. Move that away, or give --force to "
            "delete it."
        )


def delete_run(output_dir: Path, *, force: bool) -> list[str]:
    """Delete the files of an earlier run that are as recorded; return what stays.

    Args:
        output_dir: the run directory, which ``require_deletable`` has accepted.
        force: delete also what that function would name.
    """
    owned = _read_or_none(output_dir)
    unproven = _unproven(output_dir, owned) if force else []
    for _, path in numbered_checkpoints(output_dir):
        if (record := _read_or_none(path)) is not None:
            delete_checkpoint(path, record)
    for name in unproven:
        path = output_dir / name
        if path.parent.resolve() != (output_dir.resolve() / name).parent:
            continue  # a link leads out of the run
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if owned is not None:  # last: its record lets an interrupted deletion be repeated
        delete_owned(output_dir, owned, keeps_record=True)
    left = (path.relative_to(output_dir) for path in output_dir.rglob("*") if not path.is_dir())
    ours = (LOCK_FILE, PARTIAL_DIR, OWNERSHIP_FILE)
    return sorted(path.as_posix() for path in left if path.parts[0] not in ours)


def describe_files(names: list[str]) -> str:
    """Return the first of some names, and how many more they are."""
    said = ", ".join(shorten(name, 80) for name in names[:5])
    return said if len(names) <= 5 else f"{said} and {len(names) - 5} more"


def _unproven(output_dir: Path, owned: OwnedFiles | None) -> list[str]:
    """Return files and folders at names that a run uses which are not as a run recorded them."""
    if owned is None:
        names = (*_START_FILES, CONFIG_FILE, LOG_FILE, CURVES_DIR, MODEL_DIR, OWNERSHIP_FILE)
        found = [name for name in names if os.path.lexists(output_dir / name)]
    else:
        found = [n for n, change in changes(output_dir, owned).items() if change != "missing"]
        taken = [name for name in _WRITTEN if os.path.lexists(output_dir / name)]
        found += [name for name in taken if name not in owned.files]
    for _, path in numbered_checkpoints(output_dir):
        record = _read_or_none(path)
        changed = {} if record is None else changes(path, record)
        found += [path.name] if record is None and any(path.iterdir()) else []
        found += [f"{path.name}/{n}" for n, change in changed.items() if change != "missing"]
    return found


def _is_run(output_dir: Path) -> bool:
    """Return whether a folder without a record has the config.yaml of a run."""
    try:
        content = read_yaml(output_dir / CONFIG_FILE)
    except ConfigError:
        return False
    return {"recipe", "stage", "student", "data"} <= content.keys()


def _record(output_dir: Path, entries: Mapping[str, OwnedFile]) -> None:
    """Add files to the record of a run directory."""
    owned = _read_or_none(output_dir)  # a damaged one: what it named is not provably ours any more
    known = {} if owned is None else owned.files
    output_dir.mkdir(parents=True, exist_ok=True)
    write_owned(output_dir, {**known, **entries}, MADE_BY)


def _read_record(folder: Path) -> OwnedFiles | None:
    """Return the record of a run directory or a checkpoint; None if it has none.

    Raises:
        ConfigError: it is damaged, or of another command.
    """
    owned = read_owned(folder)
    if owned is not None and owned.made_by != MADE_BY:
        raise ConfigError(
            f"{folder} holds what `{shorten(owned.made_by, 80)}` wrote; expected a run or an empty "
            "folder. Give another --output."
        )
    return owned


def _read_or_none(folder: Path) -> OwnedFiles | None:
    try:
        return _read_record(folder)
    except ConfigError:
        return None
