"""`movekd cache show`: draw the features of images as PNG files or in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.options import (
    Cache,
    CacheShards,
    Device,
    Json,
    NamedWeights,
    build_options,
    named_weights,
)
from movekd.cli.output import print_json, progress_bar, say
from movekd.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from movekd.cache.spec import CacheSpec
    from movekd.view.features import FeatureView


def show(
    cache: Cache = "cache",
    key: Annotated[
        list[str] | None,
        typer.Option("--key", help="Key or name of an image. Repeat for several."),
    ] = None,
    random: Annotated[
        int, typer.Option("--random", min=0, help="Number of images to draw at random.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for --random.")] = 0,
    shards: CacheShards = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", help="Teacher to show. Repeat for several. Default: all."),
    ] = None,
    view: Annotated[int, typer.Option(min=0, help="0: the whole image; 1, 2, ...: tiles.")] = 0,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Run the teachers; show the error of each stored token."),
    ] = False,
    weights: NamedWeights = None,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("sheets"),
    inline: Annotated[
        bool, typer.Option("--inline", help="Show the sheets in the terminal; write no files.")
    ] = False,
    json: Json = False,
) -> None:
    """Draw features of images: tokens as colours, [CLS] attention, codec error.

    Examples:

    movekd cache show --cache cache/ --shards data/ --random 8

    movekd cache show --cache cache/ --shards data/ --key coco/0001.jpg --exact
    """
    import numpy as np

    from movekd.cache.reader import open_cache
    from movekd.corpus.index import open_corpus
    from movekd.view.contact_sheet import draw_sheet, save_sheet
    from movekd.view.features import FeatureViewer

    if not key and not random:
        raise ConfigError("no image is named; give --key NAME, or --random 8.")
    if exact and shards is None:
        raise ConfigError("--exact runs the teachers on the images; give --shards with the corpus.")
    if weights and not exact:
        raise ConfigError("--weights goes with --exact, which runs the teachers.")
    opened = open_cache(cache)
    names = tuple(teacher or opened.teachers)
    specs: dict[str, CacheSpec] = {}
    options = None
    if exact:
        from movekd.analysis.resolve_spec import spec_to_run

        places = named_weights(weights, names)
        specs = {name: spec_to_run(opened[name], None, places.get(name)) for name in names}
        options = build_options(device, "float32", 1, 0)
    viewer = FeatureViewer(
        opened, None if shards is None else open_corpus(shards), names, specs, options
    )
    keys = opened.keys
    drawn = np.random.default_rng(seed).choice(len(keys), min(random, len(keys)), replace=False)
    wanted = [*(key or []), *keys.take(drawn).to_pylist()]
    written: list[dict[str, object]] = []
    with progress_bar() as progress:
        for number, name in enumerate(wanted):
            found = viewer.key_of(name)
            features = viewer.show(found, view)
            figure = draw_sheet(features, f"{name}  view {view}  key {found[:16]}")
            if inline:
                _print_inline(figure)
            else:
                path = output / f"{found[:16]}-{view}.png"
                save_sheet(figure, path)
                teachers = [_summary(each) for each in features]
                sheet = {"name": name, "key": found, "view": view, "sheet": str(path)}
                written.append(sheet | {"teachers": teachers})
                if not json:
                    say(str(path))
            progress("show", number + 1, len(wanted))
    if json:
        print_json(written)


def _summary(features: "FeatureView") -> dict[str, object]:
    error, attention = features.error_GG, features.attention_GG
    return {
        "teacher": features.teacher,
        "reason": features.reason,
        "error_mean": None if error is None else float(error.mean()),
        "error_max": None if error is None else float(error.max()),
        "attention_max": None if attention is None else float(attention.max()),
    }


def _print_inline(figure: "Figure") -> None:
    """Print a sheet in the width of the terminal, as half blocks of 24-bit colour."""
    from rich.console import Console
    from rich_pixels import Pixels

    from movekd.view.contact_sheet import as_image

    console = Console()
    image = as_image(figure)
    width = min(console.width, image.width)
    height = 2 * round(image.height * width / image.width / 2)
    console.print(Pixels.from_image(image, resize=(width, height)))
