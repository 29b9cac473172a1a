"""Teacher features on disk in format 1: the only thing that both pipelines know."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from movekd.cache.reader import FeatureCache, TeacherCache, open_cache
    from movekd.cache.spec import CacheSpec, load_spec
    from movekd.cache.targets import TeacherTargets

__all__ = [
    "CacheSpec",
    "FeatureCache",
    "TeacherCache",
    "TeacherTargets",
    "load_spec",
    "open_cache",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `movekd cache ls` loads no torch, and the reader loads it."""
    if name not in __all__:
        raise AttributeError(f"module 'movekd.cache' has no attribute '{name}'")
    module = "spec" if name in ("CacheSpec", "load_spec") else "reader"
    return getattr(import_module(f"movekd.cache.{module}"), name)
