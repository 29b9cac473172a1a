"""Which spec to run again for a teacher of a cache: its own, or the YAML file it was built from.

A cache is data, and may be somebody else's. What its spec names of the libraries is loaded as
ever; the function that a ``provider: python`` names is code, and is run only where the user hands
over the YAML file himself. ``analysis.verify_features`` uses it.
"""

from movekd.cache.reader import TeacherCache
from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError

_OF_THE_BUILD = ("codec", "grid", "compressor", "calibration_images")
"""Keys that flags of the build change, and that say nothing about the network."""


def spec_to_run(store: TeacherCache, given: CacheSpec | None, weights: str | None) -> CacheSpec:
    """Return the spec that says anew what ``store`` holds.

    Args:
        store: the teacher in the cache.
        given: the user's own spec of the same name, None where there is none.
        weights: ``hub``, ``factory``, a directory or a file; None takes the given spec's, and
            ``hub`` without one. Not for random weights, which are drawn from the spec's seed.

    Raises:
        ConfigError: the cache names code and nobody handed it over, or the given spec is another.
    """
    stored = store.spec  # its weights are "random" or "given": a cache does not say where
    if given is None:
        if stored.provider == "python":
            raise ConfigError(
                f"it was built from a function of somebody's own, {stored.factory}, and code is "
                "not run because a cache names it. If you trust it, give the YAML file that it "
                "was built from: --teacher FILE.yaml"
            )
        if stored.weights == "random":
            return stored
        return stored.with_changes(weights=weights or "hub")
    place = "random" if stored.weights == "random" else weights or given.weights
    kept = {key: getattr(stored, key) for key in _OF_THE_BUILD}
    asked = given.with_changes(weights=place, **kept)
    if asked.fingerprint != stored.fingerprint:
        raise ConfigError(f"the YAML file is not what it was built from: {_differs(stored, asked)}")
    return asked


def _differs(stored: CacheSpec, asked: CacheSpec) -> str:
    before, now = stored.model_dump(), asked.model_dump()
    said = [
        f"{key} is {before[key]!r} in the cache, {now[key]!r} in the file"
        for key in now
        if before[key] != now[key] and key not in ("description", "max_error", "weights")
    ]
    if asked.weights == "random" != stored.weights:
        said.append("weights are random in the file alone")
    return f"{'; '.join(said)}. Give the file of the build, or leave it out."
