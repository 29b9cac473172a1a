"""Options that several commands of `movekd cache` share, and what becomes of their values."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from movekd.cache.codecs import codec_names

if TYPE_CHECKING:
    from movekd.cache.spec import CacheSpec
    from movekd.corpus.anyres import Views
    from movekd.corpus.transforms import Geometry as KnownGeometry
    from movekd.extract.options import BuildOptions

STUDENT_GRID = 24
"""Side of the grid of CLIP ViT-L/14 at 336 pixels."""

Teachers = Annotated[
    list[str],
    typer.Option("--teacher", help="Name in cache_specs/, or a YAML file. Repeat for several."),
]
Shards = Annotated[Path, typer.Option(help="Folder that `movekd shards pack` wrote.")]
Cache = Annotated[
    str, typer.Option("--cache", help="Folder of the cache, or s3://bucket/prefix, gs://...")
]
CacheArgument = Annotated[str, typer.Argument(help="Folder or URL of the cache.")]
Geometry = Annotated[
    str | None,
    typer.Option(
        help="How the whole image becomes a square: crop, pad, stretch or longest_side. Unless "
        "given, crop; with --views anyres, stretch."
    ),
]
ViewsOption = Annotated[
    str,
    typer.Option(
        "--views", help="base: the whole image; anyres: and its tiles, as LLaVA-NeXT cuts them."
    ),
]
CodecOption = Annotated[
    str | None, typer.Option(help=f"{', '.join(codec_names())}. Default: the codec of the spec.")
]
GridOption = Annotated[
    str | None, typer.Option(help="Side of the stored grid, or `native`, instead of the spec's.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="revised: the student's 24x24 grid, where that recipe's targets live; official: the "
        "specs' own grid. --grid goes before it."
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="Directory or file of the weights, instead of the spec's (one teacher)."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16, float16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass.")]
AutoBatchSize = Annotated[
    str,
    typer.Option(help="Images a forward pass, or `auto`: the largest that the device holds."),
]
StudentGrid = Annotated[
    int, typer.Option(min=1, help="Side of the student's grid, for what is pooled to it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def read_specs(
    teachers: list[str], *, recipe: str | None = None, **changes: Any
) -> "list[CacheSpec]":
    """Return the specs of the teachers asked for, with what the command line changes in them."""
    from movekd.cache.spec import WEIGHTS_WORDS, load_spec
    from movekd.errors import ConfigError

    if recipe not in (None, "official", "revised"):
        raise ConfigError(f"--recipe is '{recipe}'; expected official or revised.")
    if recipe == "revised" and changes.get("grid") is None:
        changes["grid"] = str(STUDENT_GRID)

    if changes.get("weights") is not None and len(teachers) > 1:
        raise ConfigError("--weights fits one --teacher; give the others' in YAML files of theirs.")
    if changes.get("weights") not in (None, *WEIGHTS_WORDS):
        changes["weights"] = str(Path(changes["weights"]).resolve())
    if changes.get("grid") is not None and changes["grid"] != "native":
        if not changes["grid"].isdecimal():
            raise ConfigError(f"--grid is '{changes['grid']}'; expected `native` or a number.")
        changes["grid"] = int(changes["grid"])
    given = {key: value for key, value in changes.items() if value is not None}
    specs = [load_spec(teacher).with_changes(**given) for teacher in teachers]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"a teacher is given twice: {', '.join(sorted(names))}.")
    return specs


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
    """Return where and how a build runs, `auto` resolved; with the device tried if it is here."""
    import os

    import torch

    from movekd.errors import ConfigError
    from movekd.extract.options import BuildOptions

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_here:
        _try_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is '{dtype}'; expected auto, float32, bfloat16 or float16.")
    if num_workers is None:
        num_workers = max((os.cpu_count() or 1) - 1, 1)
    if isinstance(batch_size, str) and batch_size != "auto" and not batch_size.isdecimal():
        raise ConfigError(f"--batch-size is '{batch_size}'; expected a number or `auto`.")
    images = None if batch_size == "auto" else int(batch_size)
    if images == 0:
        raise ConfigError("--batch-size is 0; expected at least 1, or `auto`.")
    if images is None and concurrent:
        raise ConfigError(
            "--batch-size auto gives each teacher the whole device, --concurrent shares it; give a "
            "number, or leave --concurrent out."
        )
    kind = getattr(torch, dtype)
    return BuildOptions(
        device, kind, images, num_workers, num_threads, compile=compile, concurrent=concurrent
    )


def _try_device(device: str) -> None:
    import torch

    from movekd.errors import ConfigError

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device} was asked for, but torch sees no GPU; use cpu.")
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"--device {device} cannot be used: {reason}") from None


def check_views(views: str) -> "Views":
    """Return which views there are to be, or say what could be asked for."""
    from movekd.corpus.anyres import Views

    check_one_of("--views", views, get_args(Views))
    return cast("Views", views)


def check_geometry(geometry: str | None, views: str = "base") -> "KnownGeometry":
    """Return the geometry, that of the views unless given, or say which there are."""
    from movekd.corpus.transforms import Geometry as Known

    if geometry is None:
        geometry = "crop" if views == "base" else "stretch"  # LLaVA-1.5's and LLaVA-NeXT's
    check_one_of("--geometry", geometry, get_args(Known))
    return cast("KnownGeometry", geometry)


def check_one_of(option: str, given: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among those known; names the nearest."""
    from movekd.errors import ConfigError, did_you_mean

    if given not in known:
        raise ConfigError(
            f"{option} is '{given}'; expected one of {', '.join(known)}."
            f"{did_you_mean(given, known)}"
        )


def named_values(given: Sequence[str], names: Sequence[str], option: str) -> dict[str, str]:
    """Return what ``VALUE`` (for all names) or repeated ``NAME=VALUE`` say, by name."""
    from movekd.errors import ConfigError, did_you_mean

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
