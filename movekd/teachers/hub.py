"""Find the weights of a spec: where they are published, and the file on this machine.

Nothing is loaded. `movekd doctor` uses it.
"""

from pathlib import Path

from movekd.cache.spec import CacheSpec
from movekd.teachers.checkpoints import Published
from movekd.teachers.providers import find_provider


def published(spec: CacheSpec) -> Published:
    """Return where the weights of a spec's model are published."""
    return find_provider(spec).published(spec)


def find_downloaded(spec: CacheSpec) -> Path | None:
    """Return the weights file of a spec in the hub's cache on this machine, or None."""
    from huggingface_hub import try_to_load_from_cache

    place = published(spec)
    if place.repo is None:
        return None
    for name in place.files:
        found = try_to_load_from_cache(place.repo, name, revision=spec.revision)
        if isinstance(found, str):
            return Path(found)
    return None
