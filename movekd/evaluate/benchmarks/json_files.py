"""Read the JSON and JSONL files of benchmarks; errors name the file, the line and the fix."""

import json
from pathlib import Path
from typing import Any

from movekd.errors import ConfigError


def read_json(path: Path, kind: type, what: str) -> Any:
    """Return a JSON file's content, a ``kind``.

    Raises:
        ConfigError: the file is missing, is not JSON or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); expected {what}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected {what}.") from None
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
        is_torn_ok: skip a last line without its end, which another process may be writing.

    Raises:
        ConfigError: the file is missing, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}); expected {what}.") from None
    entries = []
    for number, line in enumerate(lines[:-1] if is_torn_ok else lines):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}: line {number + 1} is not JSON ({error}); expected {what}."
            ) from None
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: line {number + 1} is not an object; expected {what}.")
        entries.append((f"{path}: line {number + 1}", entry))
    return entries
