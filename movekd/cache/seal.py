"""Read and write seals: JSON files that hold checksums.

A seal lists the checksums of the files that it covers, and the checksum of itself. It is written
last: a Zarr shard without a seal does not exist. Seals hold no times and no host names, so that two
builds of the same cache are equal byte for byte.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import xxhash
from pydantic import ValidationError

from movekd.cache.schema import Record
from movekd.cache.storage import Buffer, Storage
from movekd.config import validate
from movekd.errors import CacheError, ConfigError, CorruptCacheError, shorten
from movekd.files.ownership import FileEntry
from movekd.files.reading import MIB, parse_json

RecordT = TypeVar("RecordT", bound=Record)

MAX_JSON_BYTES = 4 * MIB
"""Largest JSON file of a cache: a seal whose 1,024 rows were all skipped has a tenth of it."""
_BLOCK_BYTES = MIB
_SELF = "xxh3_128"
_OWN = f', "{_SELF}": "'.encode()
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


def blocks_of(file: Any) -> Iterator[memoryview]:
    """Yield an open file in parts, all in one buffer: new memory costs more than reading it."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    while length := file.readinto(block):
        yield block[:length]


def write_sealed(storage: Storage, name: str, content: Record | Mapping[str, Any]) -> None:
    """Write a JSON file that contains the checksum of its other content."""
    storage.write(name, [sealed_bytes(content)])


def read_record(storage: Storage, name: str, kind: type[RecordT]) -> RecordT:
    """Return the record in a sealed file.

    Raises:
        CorruptCacheError: the file is damaged, or of another kind.
        CacheError: the file does not exist.
    """
    return as_record(read_sealed(storage, name, kind.remedy), f"{storage.url}/{name}", kind)


def open_record(raw: bytes, source: str, kind: type[RecordT]) -> RecordT:
    """Return the record in the bytes of a sealed file; raises as ``read_record``.

    Only the content is checked, not its spelling: for a hundred thousand seals, comparing the bytes
    takes half of the time. ``read_record`` compares them. As movekd spells a seal, its text without
    line breaks is what its checksum is of; every other spelling, and every error, takes longer.
    """
    spelled = b"".join([part.lstrip(b" ") for part in raw.replace(b",\n", b", \n").split(b"\n")])
    text, _, own = spelled.rpartition(_OWN)
    if own == f'{xxhash.xxh3_128_hexdigest(text + b"}")}"}}'.encode():
        with contextlib.suppress(ValidationError):
            return kind.model_validate_json(text + b"}")
    return as_record(_content(raw, source, kind.remedy, is_exact=False), source, kind)


def read_sealed(storage: Storage, name: str, remedy: str = "") -> dict[str, Any]:
    """Return the content of a file that ``write_sealed`` wrote, without its checksum.

    Raises:
        CorruptCacheError: the file is damaged; the message ends with the ``remedy``.
        CacheError: the file does not exist.
    """
    try:
        raw = storage.read(name, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise CacheError(f"{storage.url}/{name} does not exist. {remedy}".rstrip()) from None
    return _content(raw, f"{storage.url}/{name}", remedy, is_exact=True)


def _content(raw: bytes, source: str, remedy: str, *, is_exact: bool) -> dict[str, Any]:
    """Return what a sealed file holds; ``is_exact`` compares every byte, not only the content."""
    content = parse_json(raw, f"{source} is damaged: it", error=CorruptCacheError, remedy=remedy)
    if not isinstance(content, dict) or _SELF not in content:
        reason = "it is not a sealed JSON file."
    else:
        found = content.pop(_SELF)
        own = _self_checksum(content)
        if found == own and (not is_exact or raw == sealed_bytes(content, found)):
            return content
        reason = f"its checksum is {own}, it says {shorten(found)}."
    raise CorruptCacheError(f"{source} is damaged: {reason} {remedy}".rstrip())


def as_record(content: dict[str, Any], source: str, kind: type[RecordT]) -> RecordT:
    """Return the content of a sealed file as a record. Raises CorruptCacheError."""
    try:
        return validate(kind, content, source)
    except ConfigError as error:
        raise CorruptCacheError(
            f"{shorten(error, 1000)}; it was written by another version of movekd, or by hand. "
            f"{kind.remedy}"
        ) from None


def sealed_bytes(content: Record | Mapping[str, Any], own: Any = None) -> bytes:
    """Return the bytes of a sealed file; ``own`` is its checksum, if known."""
    if isinstance(content, Record):  # no key of a record has a default; those of other files may
        content = content.model_dump(exclude_defaults=True)
    body = dict(content) | {_SELF: _self_checksum(content) if own is None else own}
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _self_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_ENCODER.encode(content).encode())
