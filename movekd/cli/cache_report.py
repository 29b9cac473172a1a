"""`movekd cache fidelity` and `verify --recompute`: teachers run to be compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.options import (
    STUDENT_GRID,
    BatchSize,
    Device,
    Dtype,
    Geometry,
    Json,
    Shards,
    StudentGrid,
    Teachers,
    ViewsOption,
    WeightsOption,
    build_options,
    check_geometry,
    check_views,
    named_values,
    read_specs,
)
from movekd.cli.output import Progress, print_json, print_table, progress_bar, size

if TYPE_CHECKING:
    from movekd.analysis.codec_trial import GradientCosine
    from movekd.analysis.fidelity import FidelityReport


def fidelity(
    teacher: Teachers,
    shards: Shards,
    images: Annotated[int, typer.Option(min=1, help="Images to measure with.")] = 32,
    views: ViewsOption = "base",
    geometry: Geometry = None,
    weights: WeightsOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images; all cores but one.")
    ] = None,
    student_grid: StudentGrid = STUDENT_GRID,
    student_width: Annotated[int, typer.Option(min=1, help="Channels of the student.")] = 1024,
    calibration_images: Annotated[
        int | None,
        typer.Option(min=1, help="Images that fix the channel statistics, instead of the spec's."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what each codec and grid loses of a teacher, and whether a training would notice.

    The number that matters is the cosine between the gradients at the student's tokens that the
    distillation takes from decoded and from exact features.

    Example: movekd cache fidelity --teacher clip --shards data/ --images 32
    """
    from movekd.analysis.fidelity import measure_fidelity
    from movekd.corpus.index import open_corpus

    specs = read_specs(teacher, weights=weights, calibration_images=calibration_images)
    options = build_options(device, dtype, batch_size, num_workers)
    corpus, checked = open_corpus(shards), check_views(views)
    with progress_bar() as progress:
        reports = [
            measure_fidelity(
                spec,
                corpus,
                geometry=check_geometry(geometry, views),
                views=checked,
                options=options,
                num_images=images,
                student_grid=student_grid,
                student_width=student_width,
                progress=progress,
            )
            for spec in specs
        ]
    if json:
        print_json([asdict(report) for report in reports])
        return
    for report in reports:
        _print_fidelity(report)
    typer.echo(
        "* as the spec says. Cosine between KD gradients at the student's tokens, from decoded and "
        "from exact\ntargets, an image: mean (worst). untrained: random student; near: its "
        "residual is 10% of the target."
    )


def recompute_problems(
    cache: str,
    num_rows: int,
    shards: Path | None,
    teachers: Sequence[str],
    weights: Sequence[str],
    seed: int,
    device: str,
    batch_size: int,
    progress: Progress,
) -> Iterator[str]:
    """Yield what `verify --recompute` finds, see ``analysis.verify_features``.

    Raises:
        ConfigError: no --shards, or a teacher that the cache does not hold.
    """
    from movekd.analysis.verify_features import verify_features
    from movekd.cache.reader import open_cache
    from movekd.cache.spec import WEIGHTS_WORDS, load_spec
    from movekd.corpus.index import open_corpus
    from movekd.errors import ConfigError

    if shards is None:
        raise ConfigError(
            "--recompute runs the teachers on the images and needs them; give --shards with the "
            "corpus that the cache was built from."
        )
    opened = open_cache(cache)
    is_file = [teacher.endswith((".yaml", ".yml")) for teacher in teachers]
    specs = [load_spec(file) for file, is_yaml in zip(teachers, is_file, strict=True) if is_yaml]
    asked = [name for name, is_yaml in zip(teachers, is_file, strict=True) if not is_yaml]
    names = list(dict.fromkeys([*asked, *(spec.name for spec in specs)]) or opened.teachers)
    if len(names) > 1 and any("=" not in value for value in weights):
        raise ConfigError(
            f"--weights fits one teacher, the cache has {', '.join(names)}; give NAME=PATH, once "
            "for each, or name one --teacher."
        )
    yield from verify_features(
        opened.storage,
        open_corpus(shards),
        num_rows,
        options=build_options(device, "float32", batch_size, 0),  # the dtype is the build's
        teachers=names,
        specs=specs,
        weights={
            name: place if place in WEIGHTS_WORDS else str(Path(place).resolve())
            for name, place in named_values(weights, names, "--weights").items()
        },
        seed=seed,
        progress=progress,
    )


def _print_fidelity(report: "FidelityReport") -> None:
    random = "; RANDOM WEIGHTS: not this teacher's real features" if report.random_weights else ""
    ways = [
        (
            [way.codec + (" *" if way.is_spec else ""), f"{way.grid}x{way.grid}"],
            way,
        )
        for way in report.ways
    ]
    print_table(
        f"{report.teacher}: {report.num_images} images, views {report.views}, calibrated on "
        f"{report.calibration_images}{random}",
        ["codec", "grid", "an image", "error mean", "max", "token cosine", "attention L1"],
        [
            [
                *cells,
                size(way.row_bytes),
                f"{way.error_mean:.3%}",
                f"{way.error_max:.3%}",
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
        typer.echo(f"{way} cannot hold these features: {reason}")
    if report.shared_images:
        typer.echo(f"few images: {report.shared_images} of them were calibrated with as well")
    for key, reason in list(report.skipped.items())[:10]:
        typer.echo(f"{report.teacher}: skipped {key}: {reason}", err=True)


def _cosine(cosine: "GradientCosine | None") -> str:
    return "-" if cosine is None else f"{cosine.mean:.5f} ({cosine.worst:.5f})"
