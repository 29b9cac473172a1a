"""Record which files of a folder movekd wrote, and delete only those.

Input: a folder and the names of files in it. Output: ``.movekd-files.json`` with the size and the
checksum of each. A command that replaces its earlier output deletes what that file lists and is
still as listed; everything else belongs to somebody else and stays.
"""

import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from movekd.errors import ConfigError
from movekd.files.reading import MIB, read_bytes

OWNERSHIP_FILE = ".movekd-files.json"
_MAX_BYTES = 256 * MIB
_BLOCK_BYTES = 4 * MIB
_SELF = "xxh3_128"

Change = Literal["missing", "no regular file", "of another size", "of other content"]


class FileEntry(BaseModel):
    """Size and checksum of a file.

    Attributes:
        size_bytes: its size.
        xxh3_128: its checksum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: Annotated[int, Field(ge=0, le=2**50, strict=True)]
    xxh3_128: Annotated[str, Field(pattern="^[0-9a-f]{32}$", strict=True)]


class OwnedFile(FileEntry):
    """Size and checksum of a file in a record.

    Attributes:
        grows: both are those of the file's beginning, which stays while the file grows (a log).
    """

    grows: bool = False


class OwnedFiles(BaseModel):
    """What ``.movekd-files.json`` holds.

    Attributes:
        made_by: the command, say "movekd train".
        files: path below the folder, with ``/`` -> size and checksum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    made_by: str
    files: dict[str, OwnedFile]


def file_entry(path: Path, size_bytes: int | None = None) -> OwnedFile:
    """Return size and checksum of a regular file, read in blocks; raises OSError.

    With ``size_bytes``, return those of the file's beginning, which stays while the file grows.
    """
    digest, size = xxhash.xxh3_128(), 0
    left = sys.maxsize if size_bytes is None else size_bytes
    with path.open("rb") as file:
        while block := file.read(min(_BLOCK_BYTES, left - size)):
            digest.update(block)
            size += len(block)
    return OwnedFile(size_bytes=size, xxh3_128=digest.hexdigest(), grows=size_bytes is not None)


def content_entry(content: bytes) -> OwnedFile:
    """Return size and checksum of a file that will hold ``content``."""
    return OwnedFile(size_bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))


def write_owned(
    folder: Path, files: Iterable[str] | Mapping[str, OwnedFile], made_by: str
) -> OwnedFiles:
    """Write the record of a folder, whole or not at all, and durably; return it.

    Args:
        folder: the folder.
        files: paths below it, with ``/``; or these with entries that are known already.
        made_by: the command.
    """
    known = files if isinstance(files, Mapping) else {n: file_entry(folder / n) for n in files}
    owned = OwnedFiles(made_by=made_by, files=dict(sorted(known.items())))
    body = owned.model_dump(exclude_defaults=True)
    text = json.dumps(body | {_SELF: _checksum(body)}, indent=1, sort_keys=True) + "\n"
    write_durably(folder / OWNERSHIP_FILE, text.encode())
    return owned


def read_owned(folder: Path) -> OwnedFiles | None:
    """Return the record of a folder, or None if it has none.

    Raises:
        ConfigError: the record is damaged, or names a file outside of the folder.
    """
    path = folder / OWNERSHIP_FILE
    if not path.exists():
        return None
    raw = read_bytes(path, max_bytes=_MAX_BYTES)
    try:
        content = json.loads(raw)
        found = content.pop(_SELF)
        owned = OwnedFiles.model_validate(content)
        is_whole = found == _checksum(content) and all(map(_is_below, owned.files))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, ValidationError):
        is_whole = False
    if not is_whole:
        raise ConfigError(
            f"{path} is damaged; expected the record that movekd wrote, with its checksum. Nothing "
            "is deleted without it; delete the folder yourself, or give another one."
        )
    return owned


def changes(folder: Path, owned: OwnedFiles, *, by_size: bool = False) -> dict[str, Change]:
    """Return the files that are not as recorded, with what is wrong.

    Reads all of them; with ``by_size`` it compares only their sizes.
    """
    found = {}
    for name, entry in owned.files.items():
        if change := _change(folder, name, entry, by_size):
            found[name] = change
    return found


def delete_owned(
    folder: Path, owned: OwnedFiles, *, by_size: bool = False, keeps_record: bool = False
) -> dict[str, Change]:
    """Delete the files that are as recorded, then the record and the folders that became empty.

    The record goes last, so that a deletion that was interrupted can be repeated.

    Args:
        folder: the folder.
        owned: its record.
        by_size: compare only sizes: for files that the caller wrote or checked itself.
        keeps_record: leave a record without files, by which the folder is still known as movekd's.

    Returns:
        The files that stay because they are not as recorded any more. Missing files do not count.
    """
    left: dict[str, Change] = {}
    parents: set[Path] = set()
    for name, entry in owned.files.items():
        change = _change(folder, name, entry, by_size)
        if change is None:
            (folder / name).unlink()
            parents |= {folder / parent for parent in PurePosixPath(name).parents} - {folder}
        elif change != "missing":
            left[name] = change
    if keeps_record:
        write_owned(folder, {}, owned.made_by)
    else:
        (folder / OWNERSHIP_FILE).unlink(missing_ok=True)
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        try:
            parent.rmdir()
        except OSError:
            continue  # something else lies in it
    return left


def write_durably(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary name, fsync, rename, fsync the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _change(folder: Path, name: str, entry: OwnedFile, by_size: bool = False) -> Change | None:
    path = folder / name
    # A folder that was replaced by a link would lead out of ours.
    if any((folder / parent).is_symlink() for parent in PurePosixPath(name).parents[:-1]):
        return "no regular file"
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    has_grown = entry.grows and found.st_size > entry.size_bytes
    if found.st_size != entry.size_bytes and not has_grown:
        return "of another size"
    if by_size:
        return None
    now = file_entry(path, entry.size_bytes if entry.grows else None)
    return None if now == entry else "of other content"


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    is_plain = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return is_plain and path.as_posix() == name and name != "."


def _checksum(body: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
