"""Read the JSON and JSONL files of benchmarks; errors name the file, the line and the fix."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from movekd.errors import ConfigError, shorten
from movekd.files.reading import MIB, parse_json, read_bytes

_MAX_BYTES = 2048 * MIB
"""VQAv2's annotations of the training split have 390 MB."""


def read_json(path: Path, kind: type, what: str) -> Any:
    """Return a JSON file's content, a ``kind``.

    Raises:
        ConfigError: the file is missing, is not JSON or holds something else.
    """
    content = parse_json(_read_text(path, what), str(path), remedy=f"Give {what}.")
    if not isinstance(content, kind):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected {what}.")
    return content


def read_lines(
    path: Path, what: str, *, is_torn_ok: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Return the place (for messages) and the object of each line of a .jsonl; skip blank lines.

    Args:
        path: the file.
        what: the expected content, for messages.
        is_torn_ok: skip a last line without its end: another process is writing it, or was killed.

    Raises:
        ConfigError: the file is missing, or a line is not a JSON object.
    """
    lines = _read_text(path, what, is_torn_ok=is_torn_ok).split("\n")
    entries = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        entry = parse_json(line, f"{path}: line {number + 1}", remedy=f"Give {what}.")
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: line {number + 1} is not an object; expected {what}.")
        entries.append((f"{path}: line {number + 1}", entry))
    return entries


class Entry(BaseModel):
    """Base of the entries of annotation files: strict types, other keys ignored."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


EntryT = TypeVar("EntryT", bound=Entry)


def check_entry(kind: type[EntryT], value: Any, where: str) -> EntryT:
    """Return a JSON value as an entry.

    Raises:
        ConfigError: a key is missing or of another type; names the first.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the entry"
        raise ConfigError(
            f"{where}: {shorten(key)} is {shorten(repr(first['input']), 60)} ({first['msg']}); "
            "expected the benchmark's own file. Download it again."
        ) from None


def objects(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON list.

    Raises:
        ConfigError: it is no list, or holds something else.
    """
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ConfigError(
            f"{where} is {shorten(repr(content), 60)}; expected a list of objects. Download the "
            "file again."
        )
    return content


def _read_text(path: Path, what: str, *, is_torn_ok: bool = False) -> str:
    raw = read_bytes(path, max_bytes=_MAX_BYTES, remedy=f"Give {what}.")
    if is_torn_ok:
        raw = raw[: raw.rfind(b"\n") + 1]  # before decoding: it may end within a letter
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text (byte {error.start}); expected {what}. Save it as UTF-8."
        ) from None
