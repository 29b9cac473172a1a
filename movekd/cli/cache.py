"""`movekd cache`: ls and verify; the others are in modules of their own."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.cache_build import build
from movekd.cli.cache_plan import plan
from movekd.cli.cache_report import fidelity, recompute_problems
from movekd.cli.cache_show import show
from movekd.cli.options import BatchSize, CacheArgument, Device, Json
from movekd.cli.output import percent, print_json, print_table, progress_bar, size

if TYPE_CHECKING:
    from movekd.cache.verify import TeacherStatus

app = typer.Typer(no_args_is_help=True)
app.command()(build)
app.command()(plan)
app.command()(fidelity)
app.command()(show)


@app.command("ls")
def list_teachers(cache: CacheArgument = "cache", json: Json = False) -> None:
    """List the teachers of a cache: rows, completeness, size, codec, error.

    Example: movekd cache ls cache/
    """
    from movekd.cache.contents import open_contents
    from movekd.cache.verify import status

    opened = open_contents(cache)
    teachers = status(opened)
    if json:
        print_json(
            {
                "geometry": opened.geometry,
                "views": opened.views,
                "images": opened.catalog.num_images,
                "rows": len(opened.catalog.index),
                "teachers": [asdict(t) for t in teachers],
            }
        )
        return
    print_table(
        f"{cache}: {opened.catalog.num_images:,} images, geometry {opened.geometry}, views "
        f"{opened.views}: {len(opened.catalog.index):,} rows",
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
                percent(t.error_mean),
                percent(t.error_max),
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
    from movekd.cache.storage import open_storage
    from movekd.cache.verify import verify as verify_cache
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


def _state(teacher: "TeacherStatus") -> str:
    state = (
        "complete"
        if teacher.sealed_shards == teacher.total_shards
        else f"{teacher.sealed_shards} of {teacher.total_shards} Zarr shards"
    )
    state += f", {teacher.skipped} skipped" if teacher.skipped else ""
    return state + (", RANDOM WEIGHTS" if teacher.random_weights else "")
