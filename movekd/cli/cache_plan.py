"""`movekd cache plan`: estimate the size, time and break-even point of a cache."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from movekd.cli.options import (
    STUDENT_GRID,
    BatchSize,
    Cache,
    Device,
    Dtype,
    GridOption,
    Json,
    RecipeOption,
    Shards,
    StudentGrid,
    Teachers,
    Tiles,
    WeightsOption,
    build_options,
    check_tiles,
    finite,
    named_values,
    read_specs,
)
from movekd.cli.output import is_quiet, print_json, print_table, progress_bar, say, size
from movekd.errors import ConfigError

if TYPE_CHECKING:
    from movekd.analysis.plan import CachePlan


def plan(
    teacher: Teachers,
    shards: Shards,
    cache: Cache = "cache",
    tiles: Tiles = "base",
    weights: WeightsOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    num_images: Annotated[
        int | None,
        typer.Option(min=1, max=10**15, help="Images to plan for. Default: those of the corpus."),
    ] = None,
    student_grid: StudentGrid = STUDENT_GRID,
    grid: GridOption = None,
    recipe: RecipeOption = None,
    assume_rate: Annotated[
        list[str] | None,
        typer.Option(
            help="Images/s of all teachers, or NAME=RATE for one; they are then not measured."
        ),
    ] = None,
    assume_write: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            max=1e12,
            callback=finite,
            help="MB/s that one process writes to --cache. Default: measured.",
        ),
    ] = None,
    assume_read: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            max=1e12,
            callback=finite,
            help="MB/s that one process reads from it. Default: measured.",
        ),
    ] = None,
    build_hours: Annotated[
        float,
        typer.Option(
            min=1e-9,
            max=1e12,
            callback=finite,
            help="Hours for the build; gives the number of writers.",
        ),
    ] = 24.0,
    train_rate: Annotated[
        float, typer.Option(min=1e-9, max=1e12, callback=finite, help="Images/s of a training run.")
    ] = 100.0,
    epochs: Annotated[
        float, typer.Option(min=1e-9, max=1e12, callback=finite, help="Epochs of a training run.")
    ] = 1.0,
    measure_disk: Annotated[
        bool,
        typer.Option(help="Measure the disk: write up to 256 MB to --cache and delete them."),
    ] = True,
    json: Json = False,
) -> None:
    """Estimate the bytes and hours of a cache before it is built, and when it pays.

    The command measures its rates: it runs each teacher on a few images and uses the disk.

    Example: movekd cache plan --teacher clip --teacher sam --shards data/ --num-images 558000
    """
    from movekd.analysis.cost_model import Runs
    from movekd.analysis.disk_benchmark import DiskRates
    from movekd.analysis.plan import plan_cache
    from movekd.corpus.index import open_corpus

    specs = read_specs(teacher, recipe=recipe, grid=grid, weights=weights)
    assumed_disk = None
    if assume_write is not None or assume_read is not None:
        write, read = (None if rate is None else rate * 1e6 for rate in (assume_write, assume_read))
        assumed_disk = DiskRates(write, read, "assumed")
    with progress_bar() as progress:
        planned = plan_cache(
            specs,
            open_corpus(shards),
            cache,
            views=check_tiles(tiles),
            options=build_options(device, dtype, batch_size, 0),
            num_images=num_images,
            student_grid=student_grid,
            runs=Runs(train_rate, epochs),
            assumed_rates=_rates(assume_rate or [], [spec.name for spec in specs]),
            assumed_disk=assumed_disk,
            is_disk_measured=measure_disk,
            asked_hours=build_hours,
            tell=(lambda step: None) if is_quiet() else partial(say, err=True),
            progress=progress,
        )
    if json:
        print_json(planned)
        return
    _print_plan(planned, cache)
    if planned.free_bytes is not None and planned.total_bytes > planned.free_bytes:
        say(f"the specs need {size(planned.total_bytes)}: more than is free", err=True)
        raise typer.Exit(1)


def _rates(given: Sequence[str], names: Sequence[str]) -> dict[str, float]:

    rates = {}
    for name, value in named_values(given, names, "--assume-rate").items():
        try:
            rates[name] = float(value)
        except ValueError:
            raise ConfigError(
                f"--assume-rate says '{value}' for '{name}'; expected images/s, such as 120."
            ) from None
    return rates


def _print_plan(planned: "CachePlan", cache: str) -> None:
    disk = planned.disk
    rates = f"disk not measured ({disk.reason})"
    known = [disk.write_bytes_per_s, disk.read_bytes_per_s]
    if known != [None, None]:
        write, read = ("-" if rate is None else f"{size(rate)}/s" for rate in known)
        rates = f"writes {write}, reads {read} at random"
        rates += f" ({disk.reason})" if disk.reason else ""
    rows = [
        [
            p.teacher + (" *" if p.is_spec else ""),
            p.codec,
            f"{p.grid}x{p.grid}x{p.width}",
            size(p.row_bytes),
            size(p.total_bytes),
            f"{p.images_per_s:,.1f}" if p.images_per_s >= 1 else f"{p.images_per_s:.2g}",
            f"{p.hours:,.2f}",
            p.bound_by,
            *_run_cells(p),
        ]
        for p in planned.teachers
    ]
    row_bytes = sum(p.row_bytes for p in planned.teachers if p.is_spec)
    totals = [size(row_bytes), size(planned.total_bytes), "", f"{planned.hours:,.2f}", ""]
    rows.append(["all *", "", "", *totals, *_run_cells(planned)])
    columns = ["teacher", "codec", "features", "per row", "total", "images/s", "hours", "bound by"]
    print_table(
        f"{planned.num_images:,} images, {planned.num_rows:,} rows; "
        f"{size(planned.free_bytes)} free at {cache}; {rates}",
        [*columns, "read MB/s", "pays after"],
        rows,
    )
    _print_needs(planned)
    runs = planned.runs
    plural = "" if runs.epochs == 1 else "s"
    say(
        "* as the spec says. Rates are of this machine; decoding runs beside the teacher.",
        f"read: what a training of (assumed) {runs.images_per_s:g} images/s needs (--train-rate). "
        "!: the disk is slower.",
        f"pays after: runs of {runs.epochs:g} epoch{plural} after which the cache costs less than "
        "teachers in the loop.",
        f"writers: processes, one device each, that build it in {planned.asked_hours:g} hours "
        "(--build-hours).",
        "readers: processes that read as fast as a training needs. "
        "PUT, GET: requests to an object store by",
        "the build and by one training.",
    )
    assumed = dict.fromkeys(p.teacher for p in planned.teachers if p.is_assumed)
    if assumed:
        say(f"images/s assumed, not measured: {', '.join(assumed)}")
    for option, reason in planned.refused.items():
        say(f"{option} cannot hold these features: {reason}")
    if planned.random_weights:
        say(
            "measured with random weights (a plan downloads none, the build needs the real ones): "
            f"{planned.random_weights}"
        )


def _print_needs(planned: "CachePlan") -> None:
    parts = [(f"{p.teacher} *", p.needs) for p in planned.teachers if p.is_spec]
    rows = [
        [
            name,
            f"{needs.forward_hours:,.2f}",
            f"{needs.writers:,}",
            "-" if needs.readers is None else f"{needs.readers:,}",
            f"{needs.zarr_shards:,}",
            f"{needs.files:,}",
            f"{needs.put_requests:,}",
            f"{needs.get_requests:,}",
        ]
        for name, needs in [*parts, ("all *", planned.needs)]
    ]
    print_table(
        f"{size(planned.table_bytes)} of index and names, of which a process holds "
        f"{size(planned.held_bytes)}",
        ["teacher", "device hours", "writers", "readers", "Zarr shards", "files", "PUT", "GET"],
        rows,
    )


def _run_cells(planned: Any) -> list[str]:
    mark = " !" if planned.is_read_covered is False else ""
    runs = planned.break_even_runs
    paid = "never" if runs is None else f"{runs:,} run{'s' if runs > 1 else ''}"
    return [f"{planned.read_bytes_per_s / 1e6:,.1f}{mark}", paid]
