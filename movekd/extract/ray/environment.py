"""What a node of a cluster must have in common with the driver of a build.

Comes in: what the driver has and sees. Goes out: nothing, or a sentence that says what differs.
``extract.ray.cluster`` looks around on every node at the beginning, ``extract.ray.worker`` where
it is.
"""

import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from movekd.cache.storage import open_storage
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError

PACKAGES = (
    "movekd",
    "numcodecs",
    "numpy",
    "open_clip_torch",
    "pillow",
    "timm",
    "torch",
    "torchvision",
    "transformers",
    "zarr",
)
"""Packages that decide what bytes come out; the driver's versions are everybody's."""


@dataclass(frozen=True)
class NodeEnvironment:
    """What every node must see and have, as far as it can be told without loading anything.

    Attributes:
        cache_url: the cache, an absolute path or a URL.
        data_dir: the corpus, an absolute path.
        versions: of the driver, see ``PACKAGES``.
        marks: files in the cache -> content, which tell this cache from another one at its place.
        corpus_fingerprint: of the first ``num_images`` of the corpus.
        num_images: images of the cache.
    """

    cache_url: str
    data_dir: str
    versions: Mapping[str, str | None]
    marks: Mapping[str, bytes]
    corpus_fingerprint: str
    num_images: int


def probe_node() -> Callable[[dict[str, Any], list[str]], dict[str, Any]]:
    """Return a function that says what a node has, by its versions and what is wrong beside them.

    It is made here and not imported there, so that it also runs where there is no movekd.
    """

    def look(expected: dict[str, Any], packages: list[str]) -> dict[str, Any]:
        import importlib.metadata
        import warnings

        versions: dict[str, str | None] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in packages:
                try:
                    versions[name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    versions[name] = None
        problem = None
        if versions == expected["versions"]:
            from movekd.errors import MovekdError
            from movekd.extract.ray.environment import NodeEnvironment, check_visible

            try:
                check_visible(NodeEnvironment(**expected))
            except MovekdError as error:
                problem = str(error)
        return {"versions": versions, "problem": problem}

    return look


def require_versions(found: Mapping[str, str | None], expected: Mapping[str, str | None]) -> None:
    """Refuse other versions than the driver's.

    Raises:
        CacheError: names the packages and both versions.
    """
    differs = [
        f"{name} {_version(found.get(name))} (the driver has {_version(expected[name])})"
        for name in expected
        if found.get(name) != expected[name]
    ]
    if differs:
        raise CacheError(
            f"it has {', '.join(differs)}. Features of other versions differ in their last bits: "
            "install the driver's there, or keep workers off it."
        )


def check_visible(expected: NodeEnvironment) -> None:
    """Refuse a place from which the driver's cache and corpus are not seen.

    Raises:
        CacheError: another cache lies there, or none; or another corpus.
        CorpusError: no corpus.
    """
    storage = open_storage(expected.cache_url)
    if storage.read_many(list(expected.marks)) != expected.marks:
        raise CacheError(
            f"it does not see the cache that the driver builds at {expected.cache_url}. A cache "
            "of several machines lies in a folder that all of them mount at the same place, or in "
            "an object store (s3://bucket/prefix)."
        )
    corpus = open_corpus(expected.data_dir)
    if corpus.fingerprint(expected.num_images) != expected.corpus_fingerprint:
        raise CacheError(
            f"{expected.data_dir} holds another corpus there than the driver's; copy or mount the "
            "same one at the same place on every node."
        )


def installed_versions() -> dict[str, str | None]:
    """Return the version of each of ``PACKAGES`` here, None where it is not installed."""
    versions: dict[str, str | None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metadata of other packages is not ours to judge
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
    return versions


def node_name(host: str, node_id: str) -> str:
    """Return what an error calls a node."""
    return f"node {host} (Ray id {node_id[:8]})"


def _version(version: str | None) -> str:
    return "not installed" if version is None else version
