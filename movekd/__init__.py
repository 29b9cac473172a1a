"""movekd: distil several vision encoders into one, from a cache of their features."""

from movekd.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
