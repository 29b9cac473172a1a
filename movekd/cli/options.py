"""Options that several commands of `movekd cache` share, and what becomes of their values."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from movekd.build.options import BuildOptions
    from movekd.cache.spec import CacheSpec

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
Geometry = Annotated[str, typer.Option(help="crop, pad, stretch or longest_side.")]
CodecOption = Annotated[str | None, typer.Option(help="int8 or float16, instead of the spec's.")]
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
    device: str, dtype: str, batch_size: int, num_workers: int | None
) -> "BuildOptions":
    """Return where and how a build runs, `auto` resolved."""
    import os

    import torch

    from movekd.build.options import BuildOptions
    from movekd.errors import ConfigError

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device} was asked for, but torch sees no GPU; use cpu.")
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
