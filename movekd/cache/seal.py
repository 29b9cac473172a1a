"""Checksums, and the JSON files that hold them.

A seal is a JSON file that lists the checksums of what it covers and ends with one of its own. It
is written last: what has no seal does not exist. No times and no host names, so that two builds
of the same cache are equal byte for byte.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import xxhash

from movekd.cache.schema import FileEntry, Record
from movekd.cache.storage import Buffer, Storage
from movekd.config import validate
from movekd.errors import CacheError, ConfigError, CorruptCacheError

RecordT = TypeVar("RecordT", bound=Record)

_SELF = "xxh3_128"
_ENCODER = json.JSONEncoder(sort_keys=True)


def checksum(buffers: Iterable[Buffer]) -> str:
    """Return the xxh3-128 of the buffers one after the other, in hex."""
    return entry(buffers).xxh3_128


def entry(buffers: Iterable[Buffer]) -> FileEntry:
    """Return size and checksum of the buffers one after the other."""
    digest, size = xxhash.xxh3_128(), 0
    for buffer in buffers:
        digest.update(buffer)
        size += len(buffer)
    return FileEntry(size_bytes=size, xxh3_128=digest.hexdigest())


def file_entry(storage: Storage, name: str) -> FileEntry:
    """Return size and checksum of a file, read in blocks."""
    return entry(storage.blocks(name))


def write_sealed(storage: Storage, name: str, content: Record | Mapping[str, Any]) -> None:
    """Write a JSON file that ends with the checksum of the rest of itself."""
    storage.write(name, [sealed_bytes(content)])


def read_record(storage: Storage, name: str, kind: type[RecordT]) -> RecordT:
    """Return what a sealed file holds.

    Raises:
        CorruptCacheError: it is not what was written, or of another kind.
        CacheError: it does not exist.
    """
    return as_record(read_sealed(storage, name, kind.remedy), f"{storage.url}/{name}", kind)


def open_record(raw: bytes, source: str, kind: type[RecordT]) -> RecordT:
    """Return what the bytes of a sealed file hold; raises as ``read_record``.

    What they say is checked, not how: of a hundred thousand seals, the comparison with the bytes
    that were written is half of the time. ``read_record`` makes it.
    """
    return as_record(open_sealed(raw, source, kind.remedy, is_exact=False), source, kind)


def read_sealed(storage: Storage, name: str, remedy: str = "") -> dict[str, Any]:
    """Return the content of a file that ``write_sealed`` wrote, its checksum taken off.

    Raises:
        CorruptCacheError: it is not what was written; ends with the ``remedy``.
        CacheError: it does not exist.
    """
    try:
        raw = storage.read(name)
    except FileNotFoundError:
        raise CacheError(f"{storage.url}/{name} does not exist. {remedy}".rstrip()) from None
    return open_sealed(raw, f"{storage.url}/{name}", remedy)


def open_sealed(
    raw: bytes, source: str, remedy: str = "", *, is_exact: bool = True
) -> dict[str, Any]:
    """Return the content of the bytes of a sealed file, its checksum taken off.

    Args:
        raw: the bytes.
        source: what they are of.
        remedy: what to do if they are damaged.
        is_exact: whether every byte must be what was written; else the content.

    Raises:
        CorruptCacheError: they are not what was written; ends with the ``remedy``.
    """
    try:
        content = json.loads(raw)
        found = content.pop(_SELF)
        written = sealed_bytes(content, found) if is_exact else raw
    except (ValueError, KeyError, AttributeError, TypeError):
        reason = "it is not a sealed JSON file."
    else:
        own = _self_checksum(content)
        if found == own and raw == written:
            return dict(content)
        reason = f"its checksum is {own}, it says {found}."
    raise CorruptCacheError(f"{source} is damaged: {reason} {remedy}".rstrip())


def as_record(content: dict[str, Any], source: str, kind: type[RecordT]) -> RecordT:
    """Return the content of a sealed file as what it is. Raises CorruptCacheError."""
    try:
        return validate(kind, content, source)
    except ConfigError as error:
        raise CorruptCacheError(
            f"{error}; it was written by another version of movekd, or by hand. {kind.remedy}"
        ) from None


def sealed_bytes(content: Record | Mapping[str, Any], own: Any = None) -> bytes:
    """Return the content of a sealed file; ``own`` is its checksum if that is known."""
    content = content.model_dump() if isinstance(content, Record) else content
    body = dict(content) | {_SELF: _self_checksum(content) if own is None else own}
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _self_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_ENCODER.encode(content).encode())
