"""Open the corpora and caches of a run, and check that they belong together.

Input: the config. Output: one ``Source`` per corpus of `data.sources`, or the one of `data.shards`.
Used by ``run``. Two sources of one corpus, or of one cache, share what is opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from movekd.cache.inventory import require_whole
from movekd.cache.reader import FeatureCache, open_cache
from movekd.corpus.index import Corpus, open_corpus
from movekd.distill.config import DistillConfig
from movekd.errors import CacheError, ConfigError
from movekd.train.config import TrainConfig
from movekd.train.data_keys import DataConfig, SourceConfig

_FREE_KEYS = ["codec", "compressor", "recoded_from", "calibration_images", "std_floor", "revision"]
"""Keys of a spec in which caches of one run may differ: they say how tokens are stored.

Of the weights that ``revision`` leads to, the SHA-256 is compared.
"""


@dataclass(frozen=True)
class Source:
    """One corpus of a run.

    Attributes:
        keys: its part of the config.
        corpus: the images.
        cache: their targets; None without distillation.
        image_start: number of its first image, counted over all corpora of the run.
        row_start: number of its first row, counted over all caches of the run.
    """

    keys: SourceConfig
    corpus: Corpus
    cache: FeatureCache | None
    image_start: int = 0
    row_start: int = 0


def num_drawn(num_samples: int, weight: float) -> int:
    """Return how many samples an epoch takes of a source; at least one."""
    return max(1, round(weight * num_samples))


def describe_shares(
    names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], unit: str
) -> list[str]:
    """Return what an epoch takes of each source, one line each."""
    drawn = [num_drawn(*each) for each in zip(sizes, weights, strict=True)]
    return [
        f"{name}: {taken:,} of {sum(drawn):,} {unit} per epoch ({taken / sum(drawn):.1%}), from "
        f"{size:,} with weight {weight:g}."
        for name, size, weight, taken in zip(names, sizes, weights, drawn, strict=True)
    ]


def open_corpora(data: DataConfig) -> list[Corpus]:
    """Return the corpus of each source, opened once per folder.

    Raises:
        CorpusError: a folder holds none, or a damaged one.
    """
    opened: dict[Path, Corpus] = {}
    found = []
    for source in data.all_sources():
        folder = source.shards.resolve()
        if folder not in opened:
            opened[folder] = open_corpus(source.shards)
        found.append(opened[folder])
    return found


def image_starts(corpora: Sequence[Corpus]) -> list[int]:
    """Return the number of each corpus's first image, counted over all distinct corpora."""
    starts: dict[Corpus, int] = {}
    end = 0
    for corpus in corpora:
        if corpus not in starts:
            starts[corpus] = end
            end += len(corpus)
    return [starts[corpus] for corpus in corpora]


def open_sources(
    config: TrainConfig,
    cache_url: str | Path | None,
    *,
    allow_random_teachers: bool = False,
    verify_cache: bool = False,
) -> list[Source]:
    """Return what a run reads, after checking every cache against the config and the others.

    Args:
        config: the resolved run.
        cache_url: cache of every source that names none.
        allow_random_teachers: accept targets of teachers with random weights.
        verify_cache: compare each Zarr shard with its checksum before its first row is used.

    Raises:
        MovekdError: config, corpora and caches do not match; names the key that differs.
    """
    corpora = open_corpora(config.data)
    keys = config.data.all_sources()
    caches: list[FeatureCache | None] = [None] * len(keys)
    if config.distill is not None:
        opened: dict[str, FeatureCache] = {}
        for number, source in enumerate(keys):
            url = source.cache if source.cache is not None else cache_url
            if url is None:
                raise ConfigError(
                    "the config distils, but no cache was given"
                    + (f" for {source.shards}" if len(keys) > 1 else "")
                    + "; add --cache DIR, or set distill: null."
                )
            name = str(url)
            if name not in opened:
                opened[name] = open_cache(url, verify="checksum" if verify_cache else "size")
                _check_cache(config, config.distill, opened[name], allow_random_teachers)
                _require_same_teachers(config.distill, next(iter(opened.values())), opened[name])
            caches[number] = opened[name]
    starts = zip(image_starts(corpora), _row_starts(caches), strict=True)
    return [
        Source(source, corpus, cache, *start)
        for source, corpus, cache, start in zip(keys, corpora, caches, starts, strict=True)
    ]


def _row_starts(caches: Sequence[FeatureCache | None]) -> list[int]:
    starts: dict[str, int] = {}
    end = 0
    for cache in caches:
        if cache is not None and cache.url not in starts:
            starts[cache.url] = end
            end += cache.catalog.num_rows
    return [0 if cache is None else starts[cache.url] for cache in caches]


def _check_cache(
    config: TrainConfig, distill: DistillConfig, cache: FeatureCache, allow_random_teachers: bool
) -> None:
    """Check a cache against the config."""
    if cache.geometry != config.data.geometry:
        raise ConfigError(
            f"{cache.url} holds features of geometry '{cache.geometry}'; the config asks for "
            f"data.geometry '{config.data.geometry}'. Set data.geometry: {cache.geometry}, or "
            f"build a cache with --resize-mode {config.data.geometry}."
        )
    if distill.views == "all" and cache.views == "base":
        raise ConfigError(
            f"distill.views is 'all', but {cache.url} holds base views only. Build a cache with "
            "--tiles anyres, or set distill.views: base."
        )
    for name in distill.teachers:
        teacher = cache[name]
        if not teacher.is_complete:
            raise CacheError(
                f"teacher '{name}' in {cache.url} lacks {len(teacher.missing_shards)} Zarr shards; "
                f"finish it with `movekd cache build --teacher {name}` before training."
            )
        require_whole(teacher)
        if teacher.spec.weights == "random" and not allow_random_teachers:
            raise CacheError(
                f"teacher '{name}' in {cache.url} was built from random weights, which teach "
                "nothing; build it from real ones, or give --allow-random-teachers for a test."
            )


def _require_same_teachers(
    distill: DistillConfig, first: FeatureCache, other: FeatureCache
) -> None:
    """Refuse caches whose teachers are not the same networks, read at the same place.

    Raises:
        CacheError: names the teacher and the key.
    """
    for name in distill.teachers:
        a, b = first[name], other[name]
        found = [
            difference
            for difference in a.spec.differences(b.spec, f"in {other.url}")
            if difference.split(" ", 1)[0] not in _FREE_KEYS
        ]
        if a.calibration.weights_sha256 != b.calibration.weights_sha256:
            found.append(f"its weights are other ones in {other.url} (SHA-256)")
        shapes = [
            {n: array.row_shape for n, array in each.layout.arrays.items() if n.startswith("cls")}
            for each in (a, b)
        ]
        if shapes[0] != shapes[1] and not found:
            found.append(f"[CLS] arrays are {shapes[0]}, {shapes[1]} in {other.url}")
        if found:
            raise CacheError(
                f"teacher '{name}' is not the same in {first.url} and {other.url}: "
                f"{'; '.join(found)}. Expected one network per teacher in a run; build one of the "
                "caches again, or train on them one after the other with init_from."
            )
