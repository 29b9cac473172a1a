"""Check that a node of a cluster has the driver's versions, cache and corpus.

Input: what the driver has. Output: nothing, or an error that names what differs.
``extract.ray.cluster`` checks every node at the start, ``extract.ray.worker`` its own node. Ranks
of torchrun are checked alike; nothing here needs Ray.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from movekd.cache import layout
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import open_storage
from movekd.cache.writer import PACKAGES
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, ConfigError
from movekd.extract.locks import part_lock
from movekd.extract.options import BuildContext


@dataclass(frozen=True)
class NodeEnvironment:
    """What every node must have and see, as far as it can be checked without loading a teacher.

    Attributes:
        cache_url: the cache, an absolute path or a URL.
        data_dir: the corpus, an absolute path.
        versions: the driver's version of each of ``PACKAGES``.
        marks: file in the cache -> content; they tell this cache from another one at the same path.
        corpus_fingerprint: fingerprint of the first ``num_images`` images of the corpus.
        num_images: number of images in the cache.
    """

    cache_url: str
    data_dir: str
    versions: Mapping[str, str | None]
    marks: Mapping[str, bytes]
    corpus_fingerprint: str
    num_images: int


def driver_environment(context: BuildContext, specs: Sequence[CacheSpec]) -> NodeEnvironment:
    """Return what this process has, which holds the locks of the build.

    Raises:
        ConfigError: no other process can see the cache.
    """
    storage = context.storage
    if storage.url.startswith("memory:"):
        raise ConfigError(
            f"{storage.url} is in the memory of one process; workers cannot see it. Give a folder "
            "or an object store as --cache."
        )
    if storage.local_dir is None:
        marks, url = [layout.CACHE_JSON], storage.url
    else:  # the content of the locks names this process and host
        marks = [part_lock(spec.name) for spec in specs]
        url = str(storage.local_dir.absolute())
    return NodeEnvironment(
        cache_url=url,
        data_dir=str(Path(context.corpus.data_dir).absolute()),
        versions=installed_versions(),
        marks=storage.read_many(marks),
        corpus_fingerprint=context.catalog.corpus_fingerprint,
        num_images=context.catalog.num_images,
    )


def version_reader() -> Callable[[Sequence[str]], dict[str, str | None]]:
    """Return a function: names of packages -> installed versions, None where not installed.

    It is nested because Ray pickles nested functions by value: it must also run on nodes that have
    another movekd, or none.
    """

    def read_versions(packages: Sequence[str]) -> dict[str, str | None]:
        import importlib.metadata
        import warnings

        versions: dict[str, str | None] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken metadata of unrelated packages
            for name in packages:
                try:
                    versions[name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    versions[name] = None
        return versions

    return read_versions


def installed_versions() -> dict[str, str | None]:
    """Return the version of each of ``PACKAGES`` here, None where it is not installed."""
    return version_reader()(sorted(PACKAGES))


def require_versions(found: Mapping[str, str | None], expected: Mapping[str, str | None]) -> None:
    """Refuse other versions than the driver's.

    Raises:
        CacheError: names the packages and both versions.
    """
    absent = "not installed"
    differs = [
        f"{name} {found.get(name) or absent} (the driver has {expected[name] or absent})"
        for name in expected
        if found.get(name) != expected[name]
    ]
    if differs:
        raise CacheError(
            f"it has {', '.join(differs)}. Other versions give features with other last bits; "
            "install the driver's versions there, or keep workers off this node."
        )


def check_visible(expected: NodeEnvironment) -> None:
    """Refuse a node that does not see the driver's cache and corpus.

    Raises:
        CacheError: the node sees another cache, none, or another corpus.
        CorpusError: the node sees no corpus.
    """
    storage = open_storage(expected.cache_url)
    if storage.read_many(list(expected.marks)) != expected.marks:
        raise CacheError(
            f"it does not see the cache that the driver builds at {expected.cache_url}. A cache "
            "of several machines lies in a folder that all of them mount at the same path, or in "
            "an object store (s3://bucket/prefix)."
        )
    corpus = open_corpus(expected.data_dir)
    if corpus.fingerprint(expected.num_images) != expected.corpus_fingerprint:
        raise CacheError(
            f"{expected.data_dir} holds another corpus there than on the driver; copy or mount the "
            "same one at the same path on every node."
        )


def node_name(host: str, node_id: str) -> str:
    """Return the name of a node in errors."""
    return f"node {host} (Ray id {node_id[:8]})"
