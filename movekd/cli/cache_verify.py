"""`movekd cache verify`: check the bytes of a cache and, with --recompute, its features."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from movekd.cli.options import (
    MAX_COUNT,
    BatchSize,
    Cache,
    Device,
    Json,
    NamedWeights,
    PositionalCache,
    build_options,
    named_weights,
    one_cache,
)
from movekd.cli.output import Progress, print_json, progress_bar, say, size
from movekd.errors import ConfigError


def verify(
    cache: Cache = "cache",
    positional: PositionalCache = None,
    recompute: Annotated[
        int,
        typer.Option(min=0, max=MAX_COUNT, help="Also run each teacher again on this many rows."),
    ] = 0,
    shards: Annotated[
        Path | None, typer.Option(help="With --recompute: corpus that the cache was built from.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="With --recompute: name of a teacher, or its YAML file (needed for provider "
            "python). Repeat for several. Default: all."
        ),
    ] = None,
    weights: NamedWeights = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="With --recompute: seed that draws the rows.")
    ] = 0,
    device: Device = "auto",
    batch_size: BatchSize = 8,
    json: Json = False,
) -> None:
    """Check every byte of a cache against its seals, and that no file is missing.

    Example: movekd cache verify --cache cache/

    Example: movekd cache verify --cache cache/ --recompute 16 --shards data/
    """
    from movekd.cache.storage import open_storage
    from movekd.cache.verify import verify as verify_cache

    if recompute and shards is None:
        raise ConfigError(
            "--recompute runs the teachers on the images, which are not given; give --shards with "
            "the corpus that the cache was built from."
        )
    if teacher and not recompute:
        raise ConfigError("--teacher goes with --recompute; checksums are of the whole cache.")
    cache = one_cache(cache, positional)
    storage = open_storage(cache)
    total, done = sum(storage.sizes().values()), 0
    with progress_bar() as progress:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress("verify, bytes", done, total)

        problems = list(verify_cache(storage, advance))
        if recompute and shards is not None:
            problems += recompute_problems(
                *(cache, recompute, shards, teacher or [], weights or []),
                *(seed, device, batch_size, progress),
            )
    if json:
        print_json({"bytes": done, "problems": problems})
    else:
        for problem in problems:
            say(problem)
        say(f"{size(done)} read, {len(problems) or 'no'} problems")
    if problems:
        raise typer.Exit(1)


def recompute_problems(
    cache: str,
    num_rows: int,
    shards: Path,
    teachers: Sequence[str],
    weights: Sequence[str],
    seed: int,
    device: str,
    batch_size: int,
    progress: Progress,
) -> Iterator[str]:
    """Yield what ``analysis.verify_features`` finds.

    Raises:
        ConfigError: --weights does not say which teacher it is for.
        CacheError: the cache does not hold a teacher.
    """
    from movekd.analysis.verify_features import verify_features
    from movekd.cache.reader import open_cache
    from movekd.cache.spec import load_spec
    from movekd.corpus.index import open_corpus

    opened = open_cache(cache)
    files = [teacher for teacher in teachers if teacher.endswith((".yaml", ".yml"))]
    specs = [load_spec(file) for file in files]
    asked = [teacher for teacher in teachers if teacher not in files]
    names = list(dict.fromkeys([*asked, *(spec.name for spec in specs)]) or opened.teachers)
    if len(names) > 1 and any("=" not in value for value in weights):
        raise ConfigError(
            f"--weights fits one teacher, the cache has {', '.join(names)}; give NAME=PATH for "
            "each, or name one --teacher."
        )
    yield from verify_features(
        opened.storage,
        open_corpus(shards),
        num_rows,
        options=build_options(device, "float32", batch_size, 0),  # the dtype is the build's
        teachers=names,
        specs=specs,
        weights=named_weights(weights, names),
        seed=seed,
        progress=progress,
    )
