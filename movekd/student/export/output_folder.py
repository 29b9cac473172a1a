"""Write a folder whole or not at all, and replace only what movekd wrote there.

    .OUT.movekd/            the workspace beside OUT; nothing of it stays
      .movekd-files.json    says that movekd made it, so that a later command may delete it
      new/                  becomes OUT
      scratch/              files that are not kept
      old/                  what OUT held, for the moment of the replacement

Input: the folder of `movekd export` or `movekd import`. Output: the same folder with its record of
files (``files.ownership``), or an error and nothing new.
"""

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from movekd.config import read_yaml
from movekd.errors import ConfigError, MovekdError, shorten
from movekd.files.lock import hold_lock
from movekd.files.ownership import OWNERSHIP_FILE, changes, read_owned, write_owned
from movekd.student.checkpoint import ABOUT_FILE, CONFIG_FILE
from movekd.student.tensor_files import read_json

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_DISK_WORDS = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter failed")
"""What the writers of weights, which are not Python, say about a disk."""


@contextmanager
def new_directory(
    out: Path,
    made_by: str,
    *,
    overwrite: bool = False,
    force: bool = False,
    kept: Iterable[Path] = (),
) -> Iterator[Path]:
    """Yield a new directory, which becomes ``out`` if no error is raised.

    Its parent holds an empty folder ``scratch``, which is deleted at the end.

    Args:
        out: the directory to write.
        made_by: the command, for the record.
        overwrite: replace an earlier export or import in ``out``.
        force: replace it also if it has no record, or holds files of others.
        kept: directories that are read; ``out`` may not be, hold or lie in any of them.

    Raises:
        ConfigError: ``out`` may not be replaced, another command writes it, or the disk is full.
    """
    _require_apart(out, kept)
    place = out.resolve()
    workspace = place.with_name(f".{place.name}.movekd")
    lock = place.with_name(f".{place.name}.movekd.lock")
    with hold_lock(
        lock,
        lambda holder: ConfigError(
            f"{out} is being written by another command ({holder}); expected only one. Wait "
            "for it, or give another --output."
        ),
    ):
        _clear(workspace, place)
        _require_replaceable(out, overwrite=overwrite, force=force)
        try:
            new = workspace / "new"
            workspace.mkdir()
            write_owned(workspace, [], made_by)
            new.mkdir()
            (workspace / "scratch").mkdir()
            yield new
            names = (path.relative_to(new) for path in new.rglob("*") if path.is_file())
            write_owned(new, [name.as_posix() for name in names], made_by)
            if place.exists():
                place.rename(workspace / "old")
            new.rename(place)
        except Exception as error:
            if (reason := disk_error(error)) is None:
                raise
            raise ConfigError(
                f"{out} was not written: {reason}; expected a folder that can be written to, with "
                "room for the model. Nothing was left there."
            ) from None
        finally:
            _clear(workspace, place)


def disk_error(error: BaseException | None) -> str | None:
    """Return what the disk refused, if that is why an error was raised; else None."""
    for _ in range(8):
        if error is None:
            return None
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return str(error.strerror)
        is_writer = isinstance(error, OSError | RuntimeError | SafetensorError)
        if is_writer and any(word in str(error) for word in _DISK_WORDS):
            return shorten(str(error).splitlines()[0])
        error = error.__cause__ or error.__context__
    return None


def _clear(workspace: Path, place: Path) -> None:
    """Delete the workspace; put back what ``place`` held, if a command was killed in between.

    Raises:
        ConfigError: something of that name was not made by movekd.
    """
    if not workspace.exists():
        return
    if workspace.is_symlink() or not workspace.is_dir():
        is_ours = False
    elif (workspace / OWNERSHIP_FILE).is_file():
        is_ours = True
    else:  # killed before the record was written
        half_written = f".{OWNERSHIP_FILE}."
        is_ours = all(path.name.startswith(half_written) for path in workspace.iterdir())
    if not is_ours:
        raise ConfigError(
            f"{workspace} was not made by movekd (no {OWNERSHIP_FILE}); expected nothing of that "
            "name. Move it away, or give another --output."
        )
    if (workspace / "old").exists() and not place.exists():
        (workspace / "old").rename(place)
    for path in workspace.iterdir():
        if path.name != OWNERSHIP_FILE:  # goes last, so that a killed deletion can be continued
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(workspace, ignore_errors=True)


def _require_apart(out: Path, kept: Iterable[Path]) -> None:
    place = out.resolve()
    for source in kept:
        if not source.exists():
            continue  # a hub id
        there = source.resolve()
        if place.is_relative_to(there) or there.is_relative_to(place):
            raise ConfigError(
                f"--output {out} is, holds or lies in {source}, which is read; expected a "
                "directory apart from it, because what --output held is deleted. Give another "
                "--output."
            )


def _require_replaceable(out: Path, *, overwrite: bool, force: bool) -> None:
    place = out.resolve()
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite:
        raise ConfigError(
            f"{out} exists already; give --overwrite to replace it, or another --output."
        )
    owned = read_owned(place) if place.is_dir() else None
    if owned is None and not (place.is_dir() and _is_earlier(place)):
        raise ConfigError(
            f"{out} was not written by `movekd export` or `import` (no {OWNERSHIP_FILE}, no "
            f"{ABOUT_FILE}, no imported model), and --overwrite deletes nothing else. Give another "
            "--output, or delete it yourself."
        )
    if owned is not None and not owned.made_by.startswith(("movekd export", "movekd import")):
        raise ConfigError(
            f"{out} was written by `{shorten(owned.made_by)}`; expected an export or an import. "
            "Give another --output."
        )
    if force:
        return
    if owned is None:
        raise ConfigError(
            f"{out} has no record of the files that movekd wrote ({OWNERSHIP_FILE}; earlier "
            "versions wrote none), so files of others cannot be told apart. Give --overwrite "
            "--force to delete all that is in it, or another --output."
        )
    ours = {*owned.files, OWNERSHIP_FILE}
    found = (path for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    others = [name for path in found if (name := path.relative_to(place).as_posix()) not in ours]
    others += [name for name, change in changes(place, owned).items() if change != "missing"]
    if others:
        raise ConfigError(
            f"{out} holds {len(others)} files that movekd did not write or that were changed "
            f"since ({shorten(', '.join(sorted(others)[:3]))}); expected only its own. Move them "
            "away, or give --overwrite --force to delete them, too."
        )


def _is_earlier(directory: Path) -> bool:
    """Return whether it is an export or import without a record: no run, no files of others."""
    try:
        if (directory / ABOUT_FILE).is_file():
            return "format" in read_json(directory / ABOUT_FILE)
        config = directory / "model" / CONFIG_FILE
        is_alone = [path.name for path in directory.iterdir()] == ["model"]  # a run has more
        return is_alone and "imported" in read_yaml(config)
    except (MovekdError, OSError):
        return False
