"""`movekd cache build`: run teachers over a corpus, here or in a Ray cluster."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Any

import typer

from movekd.cli.options import (
    MAX_PROCESSES,
    AutoBatchSize,
    Cache,
    CalibrationImages,
    CodecOption,
    Device,
    Dtype,
    GridOption,
    Json,
    RecipeOption,
    ResizeMode,
    Shards,
    Teachers,
    Tiles,
    WeightsOption,
    build_options,
    check_one_of,
    check_resize_mode,
    check_tiles,
    finite,
    read_specs,
    resolve_device,
)
from movekd.cli.output import is_verbose, percent, print_json, print_table, progress_bar, say, size
from movekd.distributed import torchrun_rank
from movekd.errors import ConfigError


def build(
    teacher: Teachers,
    shards: Shards,
    cache: Cache = "cache",
    tiles: Tiles = "base",
    resize_mode: ResizeMode = None,
    codec: CodecOption = None,
    grid: GridOption = None,
    recipe: RecipeOption = None,
    compressor: Annotated[
        str | None, typer.Option(help="none, zstd or blosc (archives). Default: the spec's.")
    ] = None,
    weights: WeightsOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: AutoBatchSize = "32",
    num_workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_PROCESSES,
            help="Local: processes that decode images. Default: all cores but one (torchrun: of "
            "the rank's share). Ray: workers that hold the teachers. Default: one per GPU (one per "
            "node without GPUs).",
        ),
    ] = None,
    num_threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_PROCESSES,
            help="CPU threads per forward pass. Use the same value for identical output. "
            "Default: torch's setting.",
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile teachers with torch.compile (minutes).")
    ] = False,
    concurrent: Annotated[
        bool,
        typer.Option(
            "--concurrent", help="Keep all teachers on the device. Default: one after another."
        ),
    ] = False,
    calibration_images: CalibrationImages = None,
    max_skipped_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="Exit 1 if a larger fraction of images is unreadable.",
        ),
    ] = 0.001,
    channel_stats: Annotated[
        str | None,
        typer.Option(help="Cache whose calibration to use: for parts of one corpus."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: workers of a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray: auto (the cluster of this machine), HOST:PORT, ray://HOST:PORT, or local "
            "(only this machine). Default: auto."
        ),
    ] = None,
    num_gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_PROCESSES,
            callback=finite,
            help="Ray: GPUs per worker, or a fraction. Default: 1 (0 on CPUs).",
        ),
    ] = None,
    num_decoders: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_PROCESSES, help="Ray: processes per worker that decode images."
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="i/n: build part i of n, counted from 0. For many machines without Ray; the "
            "first one calibrates."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="First compare every sealed byte, and build again what differs. Default: only "
            "existence and size.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="First delete these teachers from the cache.")
    ] = False,
    json: Json = False,
) -> None:
    """Run frozen teachers once over a corpus and store their features.

    Interrupt it at any time: the same command resumes. Sealed files that are gone or have another
    size are built again.

    Example: movekd cache build --teacher clip --teacher eva02 --shards data/ --cache cache/

    Example: movekd cache build --teacher clip --shards /shared/data --cache /shared/cache
    --engine ray --num-workers 16

    Example: sbatch --array=0-15 --wrap 'movekd cache build --teacher clip --shards /shared/data
    --cache /shared/cache --partition $SLURM_ARRAY_TASK_ID/16'

    Example: torchrun --nproc-per-node 8 -m movekd cache build --teacher clip --shards data/ --cache
    cache/
    """
    from movekd.corpus.index import open_corpus
    from movekd.extract.executor import Executor
    from movekd.extract.partition import parse_partition
    from movekd.extract.rank_store import RankStore
    from movekd.extract.run import build_cache
    from movekd.extract.torchrun import (
        TorchrunExecutor,
        build_share,
        rank_resources,
        require_torchrun_options,
    )

    specs = read_specs(
        teacher,
        recipe=recipe,
        codec=codec,
        grid=grid,
        compressor=compressor,
        weights=weights,
        calibration_images=calibration_images,
    )
    part = None if partition is None else parse_partition(partition)
    corpus = open_corpus(shards)
    check_one_of("--engine", engine, ("local", "ray"))
    rank = torchrun_rank()
    if rank is not None:
        require_torchrun_options(rank, partition=partition, engine=engine, overwrite=overwrite)
        rank = None if rank.world_size == 1 else rank
    place: AbstractContextManager[Any] = nullcontext() if rank is None else RankStore(rank)
    if engine == "local":
        of_ray = {
            "--address": address,
            "--num-gpus-per-worker": num_gpus_per_worker,
            "--num-decoders": num_decoders,
        }
        for option, value in of_ray.items():
            if value is not None:
                raise ConfigError(
                    f"{option} goes with --engine ray, but the engine is local. Add --engine ray, "
                    f"or leave {option} out."
                )
    elif part is not None:
        raise ConfigError(
            "--partition divides the work by hand, --engine ray divides it among its workers; "
            "leave one of the two out."
        )
    else:
        from movekd.extract.ray.cluster import RayCluster
        from movekd.extract.ray.executor import RayExecutor

        place = RayCluster(
            address or "auto",
            num_workers=num_workers,
            num_gpus_per_worker=num_gpus_per_worker,
            num_decoders=num_decoders,
            device=device,
            is_verbose=is_verbose(),
        )
    with place as entered, progress_bar() as progress:
        executor: Executor | None = None
        if engine == "ray":
            device, executor = entered.device, RayExecutor(entered)
        elif rank is not None:
            device, num_workers = rank_resources(resolve_device(device), num_workers, rank)
            executor = TorchrunExecutor(entered)
        options = build_options(
            device,
            dtype,
            batch_size,
            num_workers,
            num_threads=num_threads,
            compile=compile,
            concurrent=concurrent,
            is_here=engine == "local",
        )
        if rank is not None and rank.index > 0:
            build_share(entered, options)
            return
        summaries = list(
            build_cache(
                cache,
                corpus,
                specs,
                geometry=check_resize_mode(resize_mode, tiles),
                views=check_tiles(tiles),
                options=options,
                executor=executor,
                partition=part,
                replace=overwrite,
                is_verifying=verify,
                channel_stats=channel_stats,
                deletes=_print_deletion,
                tell=partial(say, err=True),
                progress=progress,
            )
        )
    if json:
        print_json(summaries)
    else:
        print_table(
            cache,
            [
                *("teacher", "images", "built now", "skipped", "size", "error mean", "max"),
                *("limited", "images/s"),
            ],
            [
                [
                    s.status.teacher,
                    s.status.images,
                    s.images_built,
                    len(s.skipped),
                    size(s.status.size_bytes),
                    percent(s.status.error_mean),
                    percent(s.status.error_max),
                    percent(s.status.error_limited_mean),
                    f"{s.images_built / s.seconds:,.1f}" if s.images_built else "-",
                ]
                for s in summaries
            ],
        )
    has_problem = False
    for s in summaries:
        for key, reason in list(s.skipped.items())[:10]:
            say(f"{s.status.teacher}: skipped {key}: {reason}", err=True)
        has_problem |= len(s.skipped) > max_skipped_fraction * s.status.images
    if has_problem:
        say(f"more than {max_skipped_fraction:.2%} of the images were skipped", err=True)
        raise typer.Exit(1)


def _print_deletion(folder: str, sizes: Mapping[str, int]) -> None:
    there = f"{len(sizes)} files, {size(sum(sizes.values()))}"
    say(f"deleting {folder} ({there}); if interrupted, resume without --overwrite", err=True)
