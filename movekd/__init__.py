"""Distil several vision encoders into one, from a cache of their features."""

__version__ = "0.1.0"
