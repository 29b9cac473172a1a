"""Codecs by name: how the tokens of a teacher are stored.

A new codec is one file in this folder, with a class after ``interface.Codec``, and its class in the
imports and in `_SHIPPED` below. Code outside this package calls ``register_codec``.
"""

from movekd.cache.codecs.float16 import Float16
from movekd.cache.codecs.int4 import Int4
from movekd.cache.codecs.int8 import Int8
from movekd.cache.codecs.interface import ArrayLayout, Codec, TokenErrors
from movekd.cache.codecs.lloyd import Lloyd2, Lloyd3, Lloyd4
from movekd.cache.codecs.lowrank import Lowrank, lowrank_codec
from movekd.errors import ConfigError, did_you_mean

__all__ = ["ArrayLayout", "Codec", "TokenErrors", "codec", "codec_names", "register_codec"]

_CODECS: dict[str, Codec] = {}


def register_codec(new: Codec) -> None:
    """Make a codec available to specs, builds, readers and commands by its name.

    Raises:
        ConfigError: another codec has this name; caches of that codec would be decoded wrongly.
    """
    known = _CODECS.get(new.name) or lowrank_codec(new.name) or new
    if type(known) is not type(new):
        raise ConfigError(
            f"a codec '{new.name}' exists already ({type(known).__qualname__}), and "
            "caches are decoded by name; give the new codec another name."
        )
    _CODECS[new.name] = new


def codec_names() -> tuple[str, ...]:
    """Return the names of all codecs, in the order in which they were registered.

    Of ``lowrank`` they are some ranks; ``codec`` knows every one.
    """
    return tuple(_CODECS)


def codec(name: str) -> Codec:
    """Return the codec of this name.

    Raises:
        ConfigError: the name is unknown. Names the nearest one.
    """
    known = _CODECS.get(name) or lowrank_codec(name)
    if known is None:
        raise ConfigError(
            f"no codec '{name}'.{did_you_mean(name, _CODECS)} Known: {', '.join(_CODECS)}; add "
            "another one with movekd.cache.codecs.register_codec."
        )
    return known


_SHIPPED = (
    *(Float16(), Int8(), Int4(), Lloyd4(), Lloyd3(), Lloyd2()),
    *(Lowrank(16), Lowrank(32), Lowrank(64)),
)
for _shipped in _SHIPPED:
    register_codec(_shipped)
