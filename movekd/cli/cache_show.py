"""`movekd cache show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.options import Cache, Device, Json, build_options, named_values
from movekd.cli.output import print_json, progress_bar

if TYPE_CHECKING:
    from movekd.cache.reader import FeatureCache
    from movekd.cache.spec import CacheSpec
    from movekd.view.features import FeatureView


def show(
    cache: Cache = "cache",
    key: Annotated[
        list[str] | None,
        typer.Option("--key", help="Key or name of an image. Repeat for several."),
    ] = None,
    random: Annotated[
        int, typer.Option("--random", min=0, help="So many images, drawn by --seed.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of --random.")] = 0,
    shards: Annotated[
        Path | None,
        typer.Option(help="The corpus that it was built from: shows the pictures, too."),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", help="Whose features; all unless given. Repeat for several."),
    ] = None,
    view: Annotated[int, typer.Option(min=0, help="0: the whole image; 1, 2, ...: tiles.")] = 0,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Run the teachers and show the error of each token, too."),
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="With --exact: NAME=PATH, as for `verify --recompute`."),
    ] = None,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder of the PNG files.")] = Path("sheets"),
    inline: Annotated[
        bool, typer.Option("--inline", help="Show the sheets in the terminal, write no files.")
    ] = False,
    json: Json = False,
) -> None:
    """Draw what the teachers say of an image: tokens as colours, [CLS] attention, codec error.

    Examples:

    movekd cache show --cache cache/ --shards data/ --random 8

    movekd cache show --cache cache/ --shards data/ --key coco/0001.jpg --exact
    """
    from movekd.cache.reader import open_cache
    from movekd.corpus.index import open_corpus
    from movekd.errors import ConfigError
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
    specs = _specs_to_run(opened, names, weights or []) if exact else {}
    options = build_options(device, "float32", 1, 0) if exact else None
    looker = FeatureViewer(
        opened, None if shards is None else open_corpus(shards), names, specs, options
    )
    wanted = [*(key or []), *_draw(opened, random, seed)]
    written = []
    with progress_bar() as progress:
        for number, name in enumerate(wanted):
            found = looker.key_of(name)
            looks = looker.look(found, view)
            figure = draw_sheet(looks, f"{name}  view {view}  key {found[:16]}")
            if inline:
                _print_inline(figure)
            else:
                path = output / f"{found[:16]}-{view}.png"
                save_sheet(figure, path)
                written.append({"name": name, "key": found, "view": view, "sheet": str(path)})
                written[-1]["teachers"] = [_figures(look) for look in looks]
                if not json:
                    typer.echo(str(path))
            progress("show", number + 1, len(wanted))
    if json:
        print_json(written)


def _specs_to_run(
    cache: "FeatureCache", names: tuple[str, ...], weights: list[str]
) -> "dict[str, CacheSpec]":
    """Return the spec of each teacher, with the weights that the command line names."""
    from movekd.analysis.resolve_spec import spec_to_run
    from movekd.cache.spec import WEIGHTS_WORDS

    given = named_values(weights, names, "--weights")
    places = {
        name: place if place in WEIGHTS_WORDS else str(Path(place).resolve())
        for name, place in given.items()
    }
    return {name: spec_to_run(cache[name], None, places.get(name)) for name in names}


def _draw(cache: "FeatureCache", number: int, seed: int) -> list[str]:
    """Return keys of images, drawn without repeats."""
    import numpy as np

    keys = cache.keys
    drawn = np.random.default_rng(seed).choice(len(keys), min(number, len(keys)), replace=False)
    return [str(key) for key in keys.take(drawn).to_pylist()]


def _figures(look: "FeatureView") -> dict[str, object]:
    error = look.error_GG
    return {
        "teacher": look.teacher,
        "reason": look.reason,
        "error_mean": None if error is None else float(error.mean()),
        "error_max": None if error is None else float(error.max()),
        "attention_max": None if look.attention_GG is None else float(look.attention_GG.max()),
    }


def _print_inline(figure: object) -> None:
    """Print a sheet with half blocks of 24-bit colour, as wide as the terminal."""
    from typing import cast

    from matplotlib.figure import Figure
    from rich.console import Console
    from rich_pixels import Pixels

    from movekd.view.contact_sheet import as_image

    console = Console()
    image = as_image(cast(Figure, figure))
    width = min(console.width, image.width)
    height = 2 * round(image.height * width / image.width / 2)
    console.print(Pixels.from_image(image, resize=(width, height)))
