"""`movekd cache build`: on this machine, as one of many parts, or in a Ray cluster."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.options import (
    AutoBatchSize,
    Cache,
    CodecOption,
    Device,
    Dtype,
    Geometry,
    GridOption,
    Json,
    RecipeOption,
    Shards,
    Teachers,
    ViewsOption,
    WeightsOption,
    build_options,
    check_geometry,
    check_one_of,
    check_views,
    read_specs,
)
from movekd.cli.output import (
    is_verbose,
    percent,
    print_json,
    print_table,
    progress_bar,
    size,
)

if TYPE_CHECKING:
    from movekd.extract.executor import Executor
    from movekd.extract.ray.cluster import RayCluster


def build(
    teacher: Teachers,
    shards: Shards,
    cache: Cache = "cache",
    views: ViewsOption = "base",
    geometry: Geometry = None,
    codec: CodecOption = None,
    grid: GridOption = None,
    recipe: RecipeOption = None,
    compressor: Annotated[
        str | None, typer.Option(help="none, zstd or blosc (archives), instead of the spec's.")
    ] = None,
    weights: WeightsOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: AutoBatchSize = "32",
    num_workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Local: processes that decode images; all cores but one. Ray: workers, each with "
            "the teachers loaded; one a GPU, or one a node without GPUs.",
        ),
    ] = None,
    num_threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of a forward pass; equal ones give equal bytes. torch's."
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Fuse teachers with torch.compile (minutes, once).")
    ] = False,
    concurrent: Annotated[
        bool,
        typer.Option("--concurrent", help="Keep all teachers on the device instead of by turns."),
    ] = False,
    calibration_images: Annotated[
        int | None, typer.Option(min=1, help="Images that fix the channel statistics.")
    ] = None,
    max_skipped: Annotated[
        float, typer.Option(min=0, max=1, help="Exit 1 if a larger share could not be read.")
    ] = 0.001,
    channel_stats: Annotated[
        str | None,
        typer.Option(help="Cache whose calibration to take over: parts of one corpus by machine."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: workers of a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray: auto (the cluster that this machine is a node of), HOST:PORT, "
            "ray://HOST:PORT, or local (this machine alone). auto."
        ),
    ] = None,
    num_gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="Ray: GPUs, or a fraction of one; 1 unless on CPUs."),
    ] = None,
    num_decoders: Annotated[
        int | None,
        typer.Option(min=0, help="Ray: processes of each worker that decode images."),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="Build part i of n, counted from 0, as i/n: many machines without Ray, at the "
            "same time or not. The first to come calibrates."
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option(help="Delete what the cache holds of these teachers first.")
    ] = False,
    json: Json = False,
) -> None:
    """Run frozen teachers once over a corpus and store their features.

    Interrupt it at any time: the same command goes on where it stopped.

    Example: movekd cache build --teacher clip --teacher eva02 --shards data/ --cache cache/

    Example: movekd cache build --teacher clip --shards /shared/data --cache /shared/cache
    --engine ray --num-workers 16

    Example: sbatch --array=0-15 --wrap 'movekd cache build --teacher clip --shards /shared/data
    --cache /shared/cache --partition $SLURM_ARRAY_TASK_ID/16'
    """
    from movekd.corpus.index import open_corpus
    from movekd.extract.partition import parse_partition
    from movekd.extract.run import build_cache

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
    corpus, summaries = open_corpus(shards), []
    _check_engine(
        engine,
        part is not None,
        {
            "--address": address,
            "--num-gpus-per-worker": num_gpus_per_worker,
            "--num-decoders": num_decoders,
        },
    )
    with (
        _cluster(
            engine, address, num_workers, num_gpus_per_worker, num_decoders, device
        ) as cluster,
        progress_bar() as progress,
    ):
        options = build_options(
            device if cluster is None else cluster.device,
            dtype,
            batch_size,
            num_workers,
            num_threads=num_threads,
            compile=compile,
            concurrent=concurrent,
            is_here=cluster is None,
        )
        for summary in build_cache(
            cache,
            corpus,
            specs,
            geometry=check_geometry(geometry, views),
            views=check_views(views),
            options=options,
            executor=_engine(cluster),
            partition=part,
            replace=replace,
            channel_stats=channel_stats,
            deletes=_say_deleting,
            progress=progress,
        ):
            summaries.append(summary)
    if json:
        print_json([asdict(summary) for summary in summaries])
    else:
        print_table(
            f"{cache}",
            ["teacher", "images", "built now", "skipped", "size", "error mean", "max", "images/s"],
            [
                [
                    s.status.teacher,
                    s.status.images,
                    s.images_built,
                    len(s.skipped),
                    size(s.status.size_bytes),
                    percent(s.status.error_mean),
                    percent(s.status.error_max),
                    f"{s.images_built / s.seconds:,.1f}" if s.images_built else "-",
                ]
                for s in summaries
            ],
        )
    has_problem = False
    for s in summaries:
        for key, reason in list(s.skipped.items())[:10]:
            typer.echo(f"{s.status.teacher}: skipped {key}: {reason}", err=True)
        has_problem |= len(s.skipped) > max_skipped * s.status.images
    if has_problem:
        typer.echo(f"more than {max_skipped:.2%} of the images were skipped", err=True)
        raise typer.Exit(1)


def _check_engine(engine: str, is_part: bool, of_ray: Mapping[str, object]) -> None:
    """Refuse an unknown engine, and options of the other one."""
    from movekd.errors import ConfigError

    check_one_of("--engine", engine, ("local", "ray"))
    given = [option for option, value in of_ray.items() if value is not None]
    if engine == "local" and given:
        raise ConfigError(
            f"{given[0]} goes with --engine ray; the build would run in this process. Add "
            "--engine ray, or leave it out."
        )
    if engine == "ray" and is_part:
        raise ConfigError(
            "--partition is for machines that know nothing of each other, --engine ray shares the "
            "work among its own; leave one of the two out."
        )


def _cluster(
    engine: str,
    address: str | None,
    num_workers: int | None,
    num_gpus_per_worker: float | None,
    num_decoders: int | None,
    device: str,
) -> "AbstractContextManager[RayCluster | None]":
    """Return the cluster to build in, or None for this machine."""
    if engine == "local":
        return nullcontext()
    from movekd.extract.ray.cluster import RayCluster

    return RayCluster(
        address or "auto",
        num_workers=num_workers,
        num_gpus_per_worker=num_gpus_per_worker,
        num_decoders=num_decoders,
        device=device,
        is_verbose=is_verbose(),
    )


def _engine(cluster: "RayCluster | None") -> "Executor | None":
    if cluster is None:
        return None
    from movekd.extract.ray.executor import RayExecutor

    return RayExecutor(cluster)


def _say_deleting(folder: str, sizes: Mapping[str, int]) -> None:
    there = f"{len(sizes)} files, {size(sum(sizes.values()))}"
    typer.echo(f"deleting {folder} ({there}); if interrupted, go on without --replace", err=True)
