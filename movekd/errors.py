"""The errors that a user can cause, as one tree.

    MovekdError                 the command line prints the message and exits with code 2
    ├── ConfigError             a YAML file, a flag or a JSON file has a wrong key or value
    ├── CorpusError             shards or their index are missing or damaged
    │   └── UnreadableImageError  one image cannot be decoded
    ├── CacheError              a cache is missing, incomplete or does not match
    │   ├── UnknownKeyError     a name or key that the cache does not hold (also a KeyError)
    │   └── CorruptCacheError   bytes differ from what their seal says
    ├── WeightsError            weights are missing, or not the ones expected
    └── TrainingError           a run cannot continue, for example because its loss is NaN

A message carries three facts: what was found, what was expected, what to do.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class MovekdError(Exception):
    """Base of every error that a user can cause and fix."""


class ConfigError(MovekdError):
    """A YAML file, a flag or a JSON file has a wrong key or value."""


class CorpusError(MovekdError):
    """Shards or their index are missing or damaged."""


class UnreadableImageError(CorpusError):
    """One image cannot be decoded."""


class CacheError(MovekdError):
    """A cache is missing, incomplete, or does not match the request."""


class UnknownKeyError(CacheError, KeyError):
    """A name or key that the cache does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


class CorruptCacheError(CacheError):
    """Bytes on disk differ from what their seal says."""


class WeightsError(MovekdError):
    """Weights are missing, or not the ones expected."""


class TrainingError(MovekdError):
    """A run cannot continue."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string.

    ``cutoff`` is the least similarity, 0 to 1; long names that share a prefix need more.
    """
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{near[0]}'?" if near else ""


def printable(text: object) -> str:
    """Return text without control characters, which a terminal would obey; file names hold any.

    Line breaks become blanks, other control characters and lone surrogates their escapes.
    """
    plain = re.sub(r"[\r\n\t]+", " ", str(text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


def shorten(text: object, max_characters: int = 200) -> str:
    """Return printable text of at most ``max_characters``; what is cut in the middle is counted."""
    raw, keep = str(text), max_characters // 2
    if len(raw) > 2 * max_characters:  # megabytes would take long to escape
        start, end = printable(raw[:keep])[:keep], printable(raw[-keep:])[-keep:]
        return f"{start} ... ({len(raw) - 2 * keep} characters) ... {end}"
    plain = printable(raw)
    if len(plain) <= max_characters:
        return plain
    return f"{plain[:keep]} ... ({len(plain) - 2 * keep} characters) ... {plain[-keep:]}"
