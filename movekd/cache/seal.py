"""Checksums, and files that appear whole or not at all.

A seal is a JSON file that lists the checksums of what it covers and ends with one of its own. It
is written last: what has no seal does not exist. No times and no host names, so that two builds
of the same cache are equal byte for byte.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from movekd.errors import CacheError, CorruptCacheError

Buffer = bytes | bytearray | memoryview
_SELF = "xxh3_128"
_BLOCK_BYTES = 8 * 2**20


def checksum(buffers: Iterable[Buffer]) -> str:
    """Return the xxh3-128 of the buffers one after the other, in hex."""
    digest = xxhash.xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Return ``{"size_bytes", "xxh3_128"}`` of a file, read in blocks."""
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(_BLOCK_BYTES), b"")
        return {"xxh3_128": checksum(blocks), "size_bytes": file.tell()}


def write_atomic(path: Path, buffers: Iterable[Buffer], temporary_dir: Path | None = None) -> None:
    """Write ``path`` whole: to a temporary name, fsync, rename, fsync of the folder.

    Args:
        path: where the file appears. Its folder is made.
        buffers: its content.
        temporary_dir: a folder of the same file system for the temporary name; that of
            ``path`` unless given (a Zarr group must not see foreign files).

    Raises:
        CacheError: the disk is full or refuses to be written.
    """
    temporary = (temporary_dir or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for buffer in buffers:
                file.write(buffer)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_dir(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CacheError(
            f"{path} cannot be written: {error.strerror}. What is sealed is safe; make room or "
            "mend the disk, then run the same command again."
        ) from None


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that ends with the checksum of the rest of itself."""
    body = dict(content) | {_SELF: _self_checksum(content)}
    write_atomic(path, [(json.dumps(body, indent=1, sort_keys=True) + "\n").encode()])


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the content of a file that ``write_sealed`` wrote, its checksum taken off.

    Raises:
        CorruptCacheError: it is not what was written.
        CacheError: it does not exist.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        found = content.pop(_SELF)
        written = (json.dumps(content | {_SELF: found}, indent=1, sort_keys=True) + "\n").encode()
    except FileNotFoundError:
        raise CacheError(f"{path} does not exist; was this folder built by movekd?") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptCacheError(f"{path} is damaged: it is not a sealed JSON file.") from None
    if found != _self_checksum(content) or raw != written:
        raise CorruptCacheError(
            f"{path} is damaged: its checksum is {_self_checksum(content)}, it says {found}."
        )
    return dict(content)


def _self_checksum(content: Mapping[str, Any]) -> str:
    return checksum([json.dumps(content, sort_keys=True).encode()])


def _fsync_dir(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
