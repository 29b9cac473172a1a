"""`movekd cache`: build, ls, verify; plan, fidelity and show are in modules of their own."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.cache_plan import plan
from movekd.cli.cache_report import fidelity, recompute_problems
from movekd.cli.cache_show import show
from movekd.cli.options import (
    AutoBatchSize,
    BatchSize,
    Cache,
    CacheArgument,
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
    check_views,
    read_specs,
)
from movekd.cli.output import print_json, print_table, progress_bar, size

if TYPE_CHECKING:
    from movekd.cache.check import TeacherStatus

app = typer.Typer(no_args_is_help=True)
app.command()(plan)
app.command()(fidelity)
app.command()(show)


@app.command()
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
        int | None, typer.Option(min=0, help="Processes that decode images; all cores but one.")
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
    replace: Annotated[
        bool, typer.Option(help="Delete what the cache holds of these teachers first.")
    ] = False,
    json: Json = False,
) -> None:
    """Run frozen teachers once over a corpus and store their features.

    Interrupt it at any time: the same command goes on where it stopped.

    Example: movekd cache build --teacher clip --teacher eva02 --shards data/ --cache cache/
    """
    from movekd.build.run import build_cache
    from movekd.corpus.index import open_corpus

    specs = read_specs(
        teacher,
        recipe=recipe,
        codec=codec,
        grid=grid,
        compressor=compressor,
        weights=weights,
        calibration_images=calibration_images,
    )
    options = build_options(
        device, dtype, batch_size, num_workers, compile=compile, concurrent=concurrent
    )
    summaries = []
    with progress_bar() as progress:
        for summary in build_cache(
            cache,
            open_corpus(shards),
            specs,
            geometry=check_geometry(geometry, views),
            views=check_views(views),
            options=options,
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
                    _percent(s.status.error_mean),
                    _percent(s.status.error_max),
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


@app.command("ls")
def list_teachers(cache: CacheArgument = "cache", json: Json = False) -> None:
    """List the teachers of a cache: rows, completeness, size, codec, error.

    Example: movekd cache ls cache/
    """
    from movekd.cache.check import status
    from movekd.cache.reader import open_cache

    opened = open_cache(cache)
    teachers = status(opened)
    if json:
        print_json(
            {
                "geometry": opened.geometry,
                "views": opened.views,
                "images": opened.catalog.num_images,
                "rows": len(opened.catalog.rows),
                "teachers": [asdict(t) for t in teachers],
            }
        )
        return
    print_table(
        f"{cache}: {opened.catalog.num_images:,} images, geometry {opened.geometry}, views "
        f"{opened.views}: {len(opened.catalog.rows):,} rows",
        [
            "teacher",
            "state",
            "rows",
            "grid",
            "channels",
            "codec",
            "size",
            "error mean",
            "max",
            "fingerprint",
        ],
        [
            [
                t.teacher,
                _state(t),
                f"{t.rows:,}",
                f"{t.grid}x{t.grid}",
                t.width,
                t.codec if t.compressor == "none" else f"{t.codec} {t.compressor}",
                size(t.size_bytes),
                _percent(t.error_mean),
                _percent(t.error_max),
                t.fingerprint[:12],
            ]
            for t in teachers
        ],
    )


@app.command()
def verify(
    cache: CacheArgument = "cache",
    recompute: Annotated[
        int, typer.Option(min=0, help="Also run the teachers again on so many rows of each.")
    ] = 0,
    shards: Annotated[
        Path | None, typer.Option(help="With --recompute: the corpus it was built from.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="With --recompute: which teachers, all unless given; the YAML file that one was "
            "built from, which provider python needs."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="With --recompute: directory or file of the weights, NAME=PATH for one of several "
            "teachers; the hub's unless given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --recompute: of the draw of rows.")] = 0,
    device: Device = "auto",
    batch_size: BatchSize = 8,
    json: Json = False,
) -> None:
    """Check every byte of a cache against its seals, and that nothing is missing.

    Example: movekd cache verify cache/

    Example: movekd cache verify cache/ --recompute 16 --shards data/
    """
    from movekd.cache.check import verify as verify_cache
    from movekd.cache.storage import open_storage
    from movekd.errors import ConfigError

    if recompute and shards is None:
        raise ConfigError(
            "--recompute runs the teachers on the images and needs them; give --shards with the "
            "corpus that the cache was built from."
        )
    if teacher and not recompute:
        raise ConfigError("--teacher goes with --recompute; checksums are of the whole cache.")
    storage = open_storage(cache)
    total, done = sum(storage.sizes().values()), 0
    with progress_bar() as progress:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress("verify, bytes", done, total)

        problems = list(verify_cache(storage, advance))
        if recompute:
            problems += recompute_problems(
                cache,
                recompute,
                shards,
                teacher or [],
                weights or [],
                seed,
                device,
                batch_size,
                progress,
            )
    if json:
        print_json({"bytes": done, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{size(done)} read, {len(problems) or 'no'} problems")
    if problems:
        raise typer.Exit(1)


def _say_deleting(folder: str, sizes: Mapping[str, int]) -> None:
    there = f"{len(sizes)} files, {size(sum(sizes.values()))}"
    typer.echo(f"deleting {folder} ({there}); if interrupted, go on without --replace", err=True)


def _state(teacher: "TeacherStatus") -> str:
    state = (
        "complete"
        if teacher.sealed_shards == teacher.total_shards
        else f"{teacher.sealed_shards} of {teacher.total_shards} Zarr shards"
    )
    state += f", {teacher.skipped} skipped" if teacher.skipped else ""
    return state + (", RANDOM WEIGHTS" if teacher.random_weights else "")


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:.3%}"
