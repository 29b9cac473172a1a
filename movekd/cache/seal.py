"""Checksums, and the JSON files that hold them.

A seal is a JSON file that lists the checksums of what it covers and ends with one of its own. It
is written last: what has no seal does not exist. No times and no host names, so that two builds
of the same cache are equal byte for byte.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from movekd.cache.storage import Buffer, Storage
from movekd.errors import CacheError, CorruptCacheError

_SELF = "xxh3_128"


def checksum(buffers: Iterable[Buffer]) -> str:
    """Return the xxh3-128 of the buffers one after the other, in hex."""
    return str(entry(buffers)["xxh3_128"])


def entry(buffers: Iterable[Buffer]) -> dict[str, Any]:
    """Return ``{"size_bytes", "xxh3_128"}`` of the buffers one after the other."""
    digest, size = xxhash.xxh3_128(), 0
    for buffer in buffers:
        digest.update(buffer)
        size += len(buffer)
    return {"xxh3_128": digest.hexdigest(), "size_bytes": size}


def file_entry(storage: Storage, name: str) -> dict[str, Any]:
    """Return ``{"size_bytes", "xxh3_128"}`` of a file, read in blocks."""
    return entry(storage.blocks(name))


def write_sealed(storage: Storage, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file that ends with the checksum of the rest of itself."""
    storage.write(name, [sealed_bytes(content)])


def read_sealed(storage: Storage, name: str) -> dict[str, Any]:
    """Return the content of a file that ``write_sealed`` wrote, its checksum taken off.

    Raises:
        CorruptCacheError: it is not what was written.
        CacheError: it does not exist.
    """
    try:
        raw = storage.read(name)
    except FileNotFoundError:
        raise CacheError(
            f"{storage.url}/{name} does not exist; was this folder built by movekd?"
        ) from None
    return open_sealed(raw, f"{storage.url}/{name}")


def open_sealed(raw: bytes, source: str) -> dict[str, Any]:
    """Return the content of the bytes of a sealed file, its checksum taken off.

    Raises:
        CorruptCacheError: they are not what was written.
    """
    try:
        content = json.loads(raw)
        found = content.pop(_SELF)
        written = sealed_bytes(content, found)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptCacheError(f"{source} is damaged: it is not a sealed JSON file.") from None
    if found != _self_checksum(content) or raw != written:
        raise CorruptCacheError(
            f"{source} is damaged: its checksum is {_self_checksum(content)}, it says {found}."
        )
    return dict(content)


def sealed_bytes(content: Mapping[str, Any], own: Any = None) -> bytes:
    """Return the content of a sealed file; ``own`` is its checksum if that is known."""
    body = dict(content) | {_SELF: _self_checksum(content) if own is None else own}
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _self_checksum(content: Mapping[str, Any]) -> str:
    return checksum([json.dumps(content, sort_keys=True).encode()])
