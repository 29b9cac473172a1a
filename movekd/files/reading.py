"""Read small files that a stranger may have written: with limits, and nothing but regular files.

Input: a path or bytes. Output: text, JSON values, or YAML values. Each file kind has one place that
reads it, and that place validates the values; this module bounds size, depth and number of values,
so that no file can exhaust memory, recurse too deeply, or wait for ever.
"""

import json
import os
import re
import stat
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import yaml

from movekd.errors import ConfigError, MovekdError, printable, shorten

MIB = 1024 * 1024
MAX_DEPTH = 64
"""Deepest nesting of JSON and YAML values; the deepest file of movekd has 8 levels."""
MAX_YAML_VALUES = 100_000
"""Most values of a YAML file, each alias counted as all values that it stands for."""
_MAX_DIGITS = 1000
"""Longest number of a YAML file; Python prints none of more than 4,300 digits."""
_DIGITS = re.compile(r"[-+]?[0-9a-fA-FxXbBoO_.:]+")


def pickle_refusal(error: BaseException) -> str | None:
    """Return why ``torch.load(weights_only=True)`` refused a file; None for another error.

    torch's own text advises to run what the file holds.
    """
    if isinstance(error, UnpicklingError) or "weights_only" in str(error).lower():
        return "it holds more than tensors or is damaged; nothing in it was run"
    return None


class SpecialFileError(OSError):
    """A path leads to a folder, FIFO, socket or device."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes, without waiting for a FIFO. Links are followed.

    Raises:
        SpecialFileError: it is no regular file.
        OSError: as of ``open``.
        ValueError: the name holds a NUL.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening, which some devices obey
        raise SpecialFileError(f"{path} is no regular file")
    # O_NONBLOCK: opening a FIFO without it waits for a writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SpecialFileError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(
    path: Path, *, max_bytes: int, error: type[MovekdError] = ConfigError, remedy: str = ""
) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file. Links are followed.
        max_bytes: size limit; more is refused before it is read.
        error: class of the error.
        remedy: last sentence of each error.

    Raises:
        MovekdError: of class ``error``: missing, no regular file, unreadable, or too large.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(max_bytes + 1) if size <= max_bytes else None
    except SpecialFileError:
        raise error(
            _sentence(f"{printable(path)} is no regular file", "a regular file", remedy)
        ) from None
    except FileNotFoundError:
        raise error(
            _sentence(f"{printable(path)} does not exist", "a file there", remedy)
        ) from None
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        why = getattr(reason, "strerror", None) or reason
        text = f"{shorten(path)} cannot be read: {why}"
        raise error(_sentence(text, "a readable file", remedy)) from None
    if raw is None or len(raw) > max_bytes:
        found_text = f"{printable(path)} has more than {max_bytes:,} bytes"
        raise error(_sentence(found_text, "a smaller file", remedy))
    return raw


def read_text(
    path: Path, *, max_bytes: int, error: type[MovekdError] = ConfigError, remedy: str = ""
) -> str:
    """Return the UTF-8 text of a regular file. Arguments and errors as of ``read_bytes``."""
    try:
        raw = read_bytes(path, max_bytes=max_bytes, error=error, remedy=remedy)
        return raw.decode("utf-8")
    except UnicodeDecodeError as reason:
        text = f"{printable(path)} is no UTF-8 text (byte {reason.start})"
        raise error(_sentence(text, "UTF-8", remedy)) from None


def parse_json(
    raw: str | bytes,
    source: str,
    *,
    error: type[MovekdError] = ConfigError,
    remedy: str = "",
    allow_nan: bool = False,
) -> Any:
    """Return the value of a JSON text.

    Args:
        raw: the text.
        source: file name or URL, shown in errors.
        error: class of the error.
        remedy: last sentence of each error.
        allow_nan: accept ``NaN`` and ``Infinity``, which logs hold.

    Raises:
        MovekdError: of class ``error``: no JSON, nested too deeply, or a number that is too long.
    """

    try:
        text = _text(raw)
        value = json.loads(text) if allow_nan else _STRICT.decode(text)
    except RecursionError:
        reason: object = f"it is nested more than {MAX_DEPTH} levels deep"
    except ValueError as caught:  # also a number of more than 4,300 digits, and no UTF-8
        reason = shorten(caught)
    else:
        # A hundred thousand seals are read at a time: few brackets cannot nest deeply.
        if text.count("{") + text.count("[") < MAX_DEPTH or _depth_is_allowed(value):
            return value
        reason = f"it is nested more than {MAX_DEPTH} levels deep"
    raise error(_sentence(f"{source} is no JSON that can be read: {reason}", "JSON", remedy))


def read_json(
    path: Path,
    *,
    max_bytes: int = 16 * MIB,
    error: type[MovekdError] = ConfigError,
    remedy: str = "",
    allow_nan: bool = False,
) -> Any:
    """Return the value in a JSON file. Arguments and errors as of the functions above."""
    raw = read_bytes(path, max_bytes=max_bytes, error=error, remedy=remedy)
    return parse_json(raw, str(path), error=error, remedy=remedy, allow_nan=allow_nan)


def parse_yaml(text: str, source: str, *, error: type[MovekdError] = ConfigError) -> Any:
    """Return the value of a YAML text: plain values only, no tags that build objects.

    Raises:
        MovekdError: of class ``error``: no YAML, nested too deeply, too many values (aliases count
            as what they stand for), or a value that its type does not allow.
    """
    try:
        if reason := _yaml_limit(text):
            raise error(_sentence(f"{source} {reason}", "a plain YAML file"))
        return yaml.safe_load(text)
    except yaml.YAMLError as caught:
        found = shorten(" ".join(str(caught).split()))
    # PyYAML's constructors raise them for dates, numbers and tags that do not parse
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as e:
        found = shorten(" ".join(f"{type(e).__name__}: {e}".split()))
    raise error(_sentence(f"{source} is not YAML: {found}", "`key: value` lines"))


def _yaml_limit(text: str) -> str:
    """Return which limit a YAML text breaks, or an empty string; reads it without recursion."""
    counts, open_anchors, done = [0], [""], dict[str, int]()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None) or ""
        if isinstance(event, yaml.AliasEvent):
            if anchor in open_anchors:
                return f"has an alias '{shorten(anchor)}' inside what it stands for"
            counts[-1] += done.get(anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            counts.append(1)
            open_anchors.append(anchor)
            if len(counts) > MAX_DEPTH:
                return f"is nested more than {MAX_DEPTH} levels deep"
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = counts.pop(), open_anchors.pop()
            counts[-1] += size
            done[name] = size
        elif isinstance(event, yaml.ScalarEvent):
            counts[-1] += 1
            done[anchor] = 1
            is_number = event.implicit[0] or str(event.tag).endswith((":int", ":float"))
            if is_number and len(event.value) > _MAX_DIGITS and _DIGITS.fullmatch(event.value):
                return f"has a number of {len(event.value):,} characters"
        if counts[-1] > MAX_YAML_VALUES:
            return f"has more than {MAX_YAML_VALUES:,} values, aliases counted in full"
    return ""


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)
"""``json.loads`` makes a decoder a call, which takes as long as decoding a seal."""


def _text(raw: str | bytes) -> str:
    """Return the text that ``json.loads`` decodes."""
    return raw if isinstance(raw, str) else raw.decode(json.detect_encoding(raw), "surrogatepass")


def _depth_is_allowed(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return True
    return False


def _sentence(found: str, expected: str, remedy: str = "") -> str:
    return f"{found}; expected {expected}. {remedy}".rstrip()
