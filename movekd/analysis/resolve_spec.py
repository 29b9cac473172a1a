"""Choose the spec that runs a cached teacher again: the cache's, or the user's YAML file.

A cache is data, perhaps of another person. Models of the libraries are loaded from its spec. But
the function that ``provider: python`` names is code, and runs only if the user gives the YAML file.
``analysis.verify_features`` uses it.
"""

from movekd.cache.reader import TeacherCache
from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError

_BUILD_KEYS = ("codec", "grid", "compressor", "calibration_images", "recoded_from")
"""Keys that flags of the build, or a recoding, may change and that do not affect the network."""


def spec_to_run(store: TeacherCache, given: CacheSpec | None, weights: str | None) -> CacheSpec:
    """Return the spec that reproduces the features in ``store``.

    Args:
        store: the teacher in the cache.
        given: the user's spec of the same name, if any.
        weights: ``hub``, ``factory``, a directory or a file. Default: those of the given spec, or
            ``hub`` without one. Ignored for random weights, which the spec's seed determines.

    Raises:
        ConfigError: the cache names code and the user gave no spec, or the given spec differs.
    """
    stored = store.spec  # its weights are "random" or "given"; a cache does not store their path
    if given is None:
        if stored.provider == "python":
            raise ConfigError(
                f"it was built with the Python function {stored.factory}, and code is not run "
                "because a cache names it. If you trust it, give the YAML file that it was built "
                "from: --teacher FILE.yaml"
            )
        if stored.weights == "random":
            return stored
        return stored.with_changes(weights=weights or "hub")
    source = "random" if stored.weights == "random" else weights or given.weights
    kept = {key: getattr(stored, key) for key in _BUILD_KEYS}
    for key in ("std_floor", "cls_attention_heads"):
        if getattr(given, key) is None:  # the cache's, which a build settles
            kept[key] = getattr(stored, key)
    asked = given.with_changes(weights=source, **kept)
    if asked.fingerprint != stored.fingerprint:
        differs = stored.differences(asked, "in the file")
        if asked.weights == "random" != stored.weights:
            differs.append("weights are random only in the file")
        raise ConfigError(
            f"the YAML file is not what it was built from: {'; '.join(differs)}. Give the YAML "
            "file of the build, or leave it out."
        )
    return asked
