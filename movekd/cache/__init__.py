"""The only thing that both pipelines know: teacher features on disk, in format 1."""

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
    """Import the reader (and torch with it) on first use only: `--help` must be quick."""
    if name in ("CacheSpec", "load_spec"):
        from movekd.cache import spec

        return getattr(spec, name)
    if name in __all__:
        from movekd.cache import reader

        return getattr(reader, name)
    raise AttributeError(f"module 'movekd.cache' has no attribute '{name}'")
