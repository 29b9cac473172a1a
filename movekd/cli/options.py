"""Options that several commands share, and the checks of their values."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from movekd.cache.codecs import codec_names
from movekd.cli.output import quiet_libraries
from movekd.errors import ConfigError, did_you_mean, shorten

if TYPE_CHECKING:
    from movekd.cache.spec import CacheSpec
    from movekd.corpus.anyres import Views
    from movekd.corpus.transforms import Geometry
    from movekd.extract.options import BuildOptions
    from movekd.student.checkpoint import TrainedStudent

STUDENT_GRID = 24
"""Side of the grid of CLIP ViT-L/14 at 336 pixels."""

Run = Annotated[
    Path,
    typer.Argument(help="Output of `movekd train` or `movekd import`, or an export of format hf."),
]
Teachers = Annotated[
    list[str],
    typer.Option("--teacher", help="Name in cache_specs/, or a YAML file. Repeat for several."),
]
Shards = Annotated[Path, typer.Option(help="Corpus: the folder that `movekd shards pack` wrote.")]
CacheShards = Annotated[
    Path | None,
    typer.Option("--shards", help="Corpus that the cache was built from, to show its images."),
]
Cache = Annotated[
    str, typer.Option("--cache", help="Folder of the cache, or s3://bucket/prefix, gs://...")
]
PositionalCache = Annotated[
    str | None, typer.Argument(hidden=True, help="Old form of --cache.", metavar="CACHE")
]
ResizeMode = Annotated[
    str | None,
    typer.Option(
        "--resize-mode",
        help="How the whole image becomes a square: crop, pad, stretch or longest_side. Default: "
        "crop (stretch with --tiles anyres).",
    ),
]
Tiles = Annotated[
    str,
    typer.Option(
        "--tiles", help="base: the whole image. anyres: also its tiles, cut as in LLaVA-NeXT."
    ),
]
CodecOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(codec_names())}, another rank of lowrank, or lowrank: its calibration "
        "chooses the rank for max_energy_error of the spec. Default: the codec of the spec."
    ),
]
GridOption = Annotated[
    str | None,
    typer.Option(
        help="Side of the stored grid: a number, native, or student (24, where the recipe "
        "`revised` needs its targets). Default: the spec's."
    ),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", hidden=True, help="Old form of --grid student.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="Directory or file of the weights of one teacher. Default: the spec's."),
]
NamedWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        help="Directory or file of the weights; NAME=PATH for one of several teachers. "
        "Default: the hub's.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16, float16.")]
MAX_BATCH_SIZE = 65_536
MAX_COUNT = 10**9
"""Largest number of images, rows or channels that an option takes."""
MAX_PROCESSES = 4_096


def finite(value: float | None) -> float | None:
    """Refuse NaN, which passes the limits of an option."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


BatchSize = Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help="Images per forward pass.")]
AutoBatchSize = Annotated[
    str, typer.Option(help="Images per forward pass, or auto: the largest that the device holds.")
]
StudentGrid = Annotated[
    int,
    typer.Option(min=1, max=1_024, help="Side of the student's grid, to which tokens are pooled."),
]
CalibrationImages = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_COUNT, help="Images for the channel statistics. Default: the spec's number."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def one_cache(cache: str, positional: str | None) -> str:
    """Return the cache that the command names, by --cache or in the old form.

    Raises:
        ConfigError: both name one.
    """
    if positional is not None and cache not in ("cache", positional):
        raise ConfigError(
            f"found two caches, '{positional}' and --cache {cache}; expected one. Leave out the "
            "first."
        )
    return positional or cache


def read_specs(
    teachers: list[str], *, recipe: str | None = None, **changes: Any
) -> "list[CacheSpec]":
    """Return the specs of the teachers, with the changes of the command line.

    Raises:
        ConfigError: a value is unknown, or one teacher is given twice.
    """
    from movekd.cache.spec import WEIGHTS_WORDS, load_spec

    if recipe not in (None, "official", "revised"):
        raise ConfigError(f"--recipe is '{recipe}'; expected official or revised.")
    if recipe == "revised" and changes.get("grid") is None:
        changes["grid"] = "student"
    if changes.get("weights") is not None:
        if len(teachers) > 1 and changes["weights"] not in WEIGHTS_WORDS:
            raise ConfigError("--weights fits one --teacher; write the others' into YAML files.")
        changes["weights"] = _resolve_weights(changes["weights"])
    grid = changes.get("grid")
    if grid == "student":
        changes["grid"] = STUDENT_GRID
    elif grid not in (None, "native"):
        if not _is_number(grid):
            raise ConfigError(f"--grid is '{shorten(grid)}'; expected native, student or a number.")
        changes["grid"] = int(grid)
    given = {key: value for key, value in changes.items() if value is not None}
    specs = [load_spec(teacher).with_changes(**given) for teacher in teachers]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"a teacher is given twice: {', '.join(sorted(names))}.")
    return specs


def resolve_device(device: str) -> str:
    """Return the device; `auto` becomes the GPU if the machine has one."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_run(run: Path, device: str) -> "TrainedStudent":
    """Return the student of --run or RUN on a device that --device names, without library logs."""
    from movekd.student.checkpoint import load_student

    quiet_libraries()
    return load_student(run, resolve_device(device))


def build_options(
    device: str,
    dtype: str,
    batch_size: int | str,
    num_workers: int | None,
    *,
    num_threads: int | None = None,
    compile: bool = False,
    concurrent: bool = False,
    is_here: bool = True,
) -> "BuildOptions":
    """Return where and how a build runs, with `auto` resolved.

    Args:
        is_here: the build runs on this machine, so the device is tried.

    Raises:
        ConfigError: a value is unknown, or the device cannot be used.
    """
    import torch

    from movekd.extract.options import BuildOptions
    from movekd.threads import num_cpus

    device = resolve_device(device)
    if is_here:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device is {device}, but torch sees no GPU; use cpu.")
        try:
            torch.empty(1, device=device).cpu()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ConfigError(f"--device {device} cannot be used: {reason}") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is '{dtype}'; expected auto, float32, bfloat16 or float16.")
    if num_workers is None:
        num_workers = max(num_cpus() - 1, 1)
    if isinstance(batch_size, str) and batch_size != "auto" and not _is_number(batch_size):
        raise ConfigError(f"--batch-size is '{shorten(batch_size)}'; expected a number or `auto`.")
    images = None if batch_size == "auto" else int(batch_size)
    if images is not None and not 1 <= images <= MAX_BATCH_SIZE:
        raise ConfigError(f"--batch-size is {images}; expected 1 to {MAX_BATCH_SIZE:,}, or `auto`.")
    if images is None and concurrent:
        raise ConfigError(
            "--batch-size auto gives each teacher the whole device, --concurrent shares it; give a "
            "number, or leave --concurrent out."
        )
    kind = getattr(torch, dtype)
    return BuildOptions(
        device, kind, images, num_workers, num_threads, compile=compile, concurrent=concurrent
    )


def check_tiles(tiles: str) -> "Views":
    """Return the value of --tiles.

    Raises:
        ConfigError: it is unknown.
    """
    from movekd.corpus.anyres import Views

    check_one_of("--tiles", tiles, get_args(Views))
    return cast("Views", tiles)


def check_resize_mode(mode: str | None, tiles: str = "base") -> "Geometry":
    """Return the value of --resize-mode, or its default for --tiles.

    Raises:
        ConfigError: it is unknown.
    """
    from movekd.corpus.transforms import Geometry

    if mode is None:
        mode = "crop" if tiles == "base" else "stretch"  # LLaVA-1.5's and LLaVA-NeXT's
    check_one_of("--resize-mode", mode, get_args(Geometry))
    return cast("Geometry", mode)


def check_one_of(option: str, given: str, known: Sequence[str]) -> None:
    """Refuse an unknown value and name the nearest known one."""
    if given not in known:
        raise ConfigError(
            f"{option} is '{given}'; expected one of {', '.join(known)}."
            f"{did_you_mean(given, known)}"
        )


def named_values(given: Sequence[str], names: Sequence[str], option: str) -> dict[str, str]:
    """Return the value for each name, from ``VALUE`` (for all) or repeated ``NAME=VALUE``."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator:
            found = dict.fromkeys(names, text) | found
        elif name in names:
            found[name] = value
        else:
            raise ConfigError(
                f"{option} names '{name}', which is not among the teachers: {', '.join(names)}."
                f"{did_you_mean(name, names)}"
            )
    return found


def named_weights(given: Sequence[str] | None, names: Sequence[str]) -> dict[str, str]:
    """Return the weights for each teacher that --weights names, as absolute paths."""
    values = named_values(given or [], names, "--weights")
    return {name: _resolve_weights(place) for name, place in values.items()}


def _is_number(text: str) -> bool:
    """Return whether a text is a whole number that Python converts; 5,000 digits it refuses."""
    return text.isascii() and text.isdecimal() and len(text) <= 20


def _resolve_weights(place: str) -> str:
    from movekd.cache.spec import WEIGHTS_WORDS

    return place if place in WEIGHTS_WORDS else os.path.abspath(place)
