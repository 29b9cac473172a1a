"""`movekd cache`: plan, build, ls, verify."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from movekd.cli.output import print_json, print_table, progress_bar, size

if TYPE_CHECKING:
    from movekd.build.run import BuildOptions
    from movekd.cache.check import TeacherStatus
    from movekd.cache.spec import CacheSpec

app = typer.Typer(no_args_is_help=True)

Teachers = Annotated[
    list[str],
    typer.Option("--teacher", help="Name in cache_specs/, or a YAML file. Repeat for several."),
]
Shards = Annotated[Path, typer.Option(help="Folder that `movekd shards pack` wrote.")]
Cache = Annotated[Path, typer.Option("--cache", help="Folder of the cache.")]
Geometry = Annotated[str, typer.Option(help="crop, pad, stretch or longest_side.")]
CodecOption = Annotated[str | None, typer.Option(help="int8 or float16, instead of the spec's.")]
GridOption = Annotated[
    str | None, typer.Option(help="Side of the stored grid, or `native`, instead of the spec's.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="Directory or file of the weights, instead of the spec's (one teacher)."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16, float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def build(
    teacher: Teachers,
    shards: Shards,
    cache: Cache = Path("cache"),
    geometry: Geometry = "crop",
    codec: CodecOption = None,
    grid: GridOption = None,
    weights: WeightsOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 32,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images; all cores but one.")
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(min=1, help="Images that fix the channel statistics.")
    ] = None,
    max_skipped: Annotated[
        float, typer.Option(min=0, max=1, help="Exit 1 if a larger share could not be read.")
    ] = 0.001,
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
    from movekd.cache.layout import group_dir
    from movekd.corpus.index import open_corpus

    specs = read_specs(
        teacher, codec=codec, grid=grid, weights=weights, calibration_images=calibration_images
    )
    options = build_options(device, dtype, batch_size, num_workers)
    if replace:
        for spec in specs:
            if group_dir(cache, spec.name).exists():
                typer.echo(f"deleting {group_dir(cache, spec.name)} and its seals", err=True)
    summaries = []
    with progress_bar() as progress:
        for summary in build_cache(
            cache,
            open_corpus(shards),
            specs,
            geometry=check_geometry(geometry),
            options=options,
            replace=replace,
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


@app.command()
def plan(
    teacher: Teachers,
    shards: Shards,
    cache: Cache = Path("cache"),
    weights: WeightsOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 8,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many images instead of the corpus'.")
    ] = None,
    student_grid: Annotated[
        int, typer.Option(min=1, help="Side of the student's grid, for the pooled sizes.")
    ] = 24,
    json: Json = False,
) -> None:
    """Say what a cache will cost before it is built: bytes, disk, hours.

    Every teacher runs on a few images of the corpus, so its rate is measured, not looked up.

    Example: movekd cache plan --teacher clip --teacher sam --shards data/ --num-images 558000
    """
    from movekd.build.plan import plan_cache
    from movekd.corpus.index import open_corpus

    planned = plan_cache(
        read_specs(teacher, weights=weights),
        open_corpus(shards),
        cache,
        options=build_options(device, dtype, batch_size, 0),
        num_images=num_images,
        student_grid=student_grid,
    )
    if json:
        print_json(asdict(planned))
        return
    print_table(
        f"{planned.num_images:,} images; {size(planned.free_bytes)} free at {cache}",
        ["teacher", "codec", "grid", "channels", "an image", "total", "forward images/s", "hours"],
        [
            [
                t.teacher + (" *" if t.is_spec else ""),
                t.codec,
                f"{t.grid}x{t.grid}",
                t.width,
                size(t.row_bytes),
                size(t.total_bytes),
                f"{t.images_per_s:,.1f}",
                f"{t.hours:,.2f}",
            ]
            for t in planned.teachers
        ],
    )
    typer.echo("* as the spec says. Rates are of this machine; decoding runs beside the teacher.")
    if planned.random_weights:
        typer.echo(f"weights not found, so measured with random ones: {planned.random_weights}")
    if planned.total_bytes > planned.free_bytes:
        typer.echo(f"the specs need {size(planned.total_bytes)}: more than is free", err=True)
        raise typer.Exit(1)


@app.command("ls")
def list_teachers(
    cache: Annotated[Path, typer.Argument()] = Path("cache"), json: Json = False
) -> None:
    """List the teachers of a cache: rows, completeness, size, codec, error.

    Example: movekd cache ls cache/
    """
    from movekd.cache.check import status
    from movekd.cache.reader import open_cache

    opened = open_cache(cache)
    teachers = status(opened)
    if json:
        print_json({"geometry": opened.geometry, "teachers": [asdict(t) for t in teachers]})
        return
    print_table(
        f"{cache}: {len(opened.keys):,} images, geometry {opened.geometry}",
        [
            "teacher",
            "state",
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
                f"{t.grid}x{t.grid}",
                t.width,
                t.codec,
                size(t.size_bytes),
                _percent(t.error_mean),
                _percent(t.error_max),
                t.fingerprint[:12],
            ]
            for t in teachers
        ],
    )


@app.command()
def verify(cache: Annotated[Path, typer.Argument()] = Path("cache"), json: Json = False) -> None:
    """Check every byte of a cache against its seals, and that nothing is missing.

    Example: movekd cache verify cache/
    """
    from movekd.cache.check import size_bytes
    from movekd.cache.check import verify as verify_cache

    total, done = size_bytes(cache) if cache.is_dir() else 0, 0
    with progress_bar() as progress:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress("verify, bytes", done, total)

        problems = list(verify_cache(cache, advance))
    if json:
        print_json({"bytes": done, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{size(done)} read, {len(problems) or 'no'} problems")
    if problems:
        raise typer.Exit(1)


def read_specs(teachers: list[str], **changes: Any) -> "list[CacheSpec]":
    """Return the specs of the teachers asked for, with what the command line changes in them."""
    from movekd.cache.spec import load_spec
    from movekd.errors import ConfigError

    if changes.get("weights") is not None and len(teachers) > 1:
        raise ConfigError("--weights fits one --teacher; give the others' in YAML files of theirs.")
    if changes.get("weights") not in (None, "hub", "random"):
        changes["weights"] = str(Path(changes["weights"]).resolve())
    if changes.get("grid") is not None and changes["grid"] != "native":
        if not changes["grid"].isdigit():
            raise ConfigError(f"--grid is '{changes['grid']}'; expected `native` or a number.")
        changes["grid"] = int(changes["grid"])
    given = {key: value for key, value in changes.items() if value is not None}
    specs = [load_spec(teacher).with_changes(**given) for teacher in teachers]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"a teacher is given twice: {', '.join(sorted(names))}.")
    return specs


def build_options(
    device: str, dtype: str, batch_size: int, num_workers: int | None
) -> "BuildOptions":
    """Return where and how a build runs, `auto` resolved."""
    import os

    import torch

    from movekd.build.run import BuildOptions
    from movekd.errors import ConfigError

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device} was asked for, but torch sees no GPU; use cpu.")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is '{dtype}'; expected auto, float32, bfloat16 or float16.")
    if num_workers is None:
        num_workers = max((os.cpu_count() or 1) - 1, 1)
    return BuildOptions(device, getattr(torch, dtype), batch_size, num_workers)


def check_geometry(geometry: str) -> Any:
    """Return the geometry, or say which there are."""
    from typing import get_args

    from movekd.corpus.images import Geometry as Known
    from movekd.errors import ConfigError, did_you_mean

    if geometry not in get_args(Known):
        raise ConfigError(
            f"--geometry is '{geometry}'; expected one of {', '.join(get_args(Known))}."
            f"{did_you_mean(geometry, get_args(Known))}"
        )
    return geometry


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
