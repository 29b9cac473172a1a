"""`movekd cache fidelity`: measure what each codec and grid loses of a teacher's features."""

from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cache.model_args import MAX_WIDTH
from movekd.cli.options import (
    MAX_COUNT,
    MAX_PROCESSES,
    STUDENT_GRID,
    BatchSize,
    CalibrationImages,
    Device,
    Dtype,
    Json,
    ResizeMode,
    Shards,
    StudentGrid,
    Teachers,
    Tiles,
    WeightsOption,
    build_options,
    check_resize_mode,
    check_tiles,
    read_specs,
)
from movekd.cli.output import print_json, print_table, progress_bar, say, size

if TYPE_CHECKING:
    from movekd.analysis.codec_trial import GradientCosine
    from movekd.analysis.fidelity import FidelityReport


def fidelity(
    teacher: Teachers,
    shards: Shards,
    num_images: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Images to measure with.")
    ] = 32,
    tiles: Tiles = "base",
    resize_mode: ResizeMode = None,
    weights: WeightsOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    num_workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_PROCESSES,
            help="Processes that decode images. Default: all cores but one.",
        ),
    ] = None,
    student_grid: StudentGrid = STUDENT_GRID,
    student_width: Annotated[
        int, typer.Option(min=1, max=MAX_WIDTH, help="Channels of the student.")
    ] = 1024,
    calibration_images: CalibrationImages = None,
    json: Json = False,
) -> None:
    """Measure what each codec and grid loses of a teacher's features.

    The figure that matters is a cosine: between the KD gradient at the student's tokens from
    decoded features and the same gradient from exact features.

    Example: movekd cache fidelity --teacher clip --shards data/ --num-images 32
    """
    from movekd.analysis.fidelity import measure_fidelity
    from movekd.corpus.index import open_corpus

    specs = read_specs(teacher, weights=weights, calibration_images=calibration_images)
    options = build_options(device, dtype, batch_size, num_workers)
    corpus = open_corpus(shards)
    with progress_bar() as progress:
        reports = [
            measure_fidelity(
                spec,
                corpus,
                geometry=check_resize_mode(resize_mode, tiles),
                views=check_tiles(tiles),
                options=options,
                num_images=num_images,
                student_grid=student_grid,
                student_width=student_width,
                progress=progress,
            )
            for spec in specs
        ]
    if json:
        print_json(reports)
        return
    for report in reports:
        _print_fidelity(report)
    say(
        "* as the spec says. Cosine between the KD gradients from decoded and from exact targets, "
        "per image:",
        "mean (worst). untrained: a random student; near: its residual is 10% of the target.",
        "limited: error mean, with values limited to 8 sigma. energy: squared error over squared "
        "norm.",
    )


def _print_fidelity(report: "FidelityReport") -> None:
    random = "; RANDOM WEIGHTS: not this teacher's real features" if report.random_weights else ""
    ways = [
        ([way.codec + (" *" if way.is_spec else ""), f"{way.grid}x{way.grid}"], way)
        for way in report.ways
    ]
    print_table(
        f"{report.teacher}: {report.num_images} images, views {report.views}, calibrated on "
        f"{report.calibration_images}{random}",
        [
            "codec",
            "grid",
            "per image",
            "error mean",
            "max",
            "limited",
            "energy",
            "token cosine",
            "attention L1",
        ],
        [
            [
                *cells,
                size(way.row_bytes),
                f"{way.error_mean:.3%}",
                f"{way.error_max:.3%}",
                f"{way.error_limited_mean:.3%}",
                f"{way.energy_error:.3%}",
                f"{way.token_cosine:.6f}",
                "-" if way.attention_l1 is None else f"{way.attention_l1:.1e}",
            ]
            for cells, way in ways
        ],
    )
    recipes = ["revised, untrained", "revised, near", "official, untrained", "official, near"]
    print_table(
        f"{report.teacher}: cosine of KD gradients, mean (worst)",
        ["codec", "grid", *recipes],
        [
            [
                *cells,
                _cosine(way.revised_untrained),
                _cosine(way.revised_near),
                _cosine(way.official_untrained),
                _cosine(way.official_near),
            ]
            for cells, way in ways
        ],
    )
    for way, reason in report.refused.items():
        say(f"{way} cannot hold these features: {reason}")
    if report.shared_images:
        say(f"few images: {report.shared_images} of them were also used for calibration")
    for key, reason in list(report.skipped.items())[:10]:
        say(f"{report.teacher}: skipped {key}: {reason}", err=True)


def _cosine(cosine: "GradientCosine | None") -> str:
    return "-" if cosine is None else f"{cosine.mean:.5f} ({cosine.worst:.5f})"
