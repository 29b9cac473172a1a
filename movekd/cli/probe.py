"""`movekd probe`: what a vision encoder is worth without a language model."""

from pathlib import Path
from typing import Annotated

import typer

from movekd.cli.options import Device, Json, resolve_device
from movekd.cli.output import print_json, print_table, progress_bar, quiet_libraries, say


def probe(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Runs, exports of format hf or encoder, Hugging Face folders of vision towers, "
            "or base:RUN, the tower that a run started from. All are compared with the first.",
        ),
    ],
    images: Annotated[
        Path, typer.Option(help="Folder with train/CLASS/ and test/CLASS/ of image files.")
    ],
    features: Annotated[
        Path | None,
        typer.Option(help="Folder to keep features in; the next probe reads them. Default: none."),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of kNN.")] = 20,
    linear: Annotated[
        bool, typer.Option("--linear/--no-linear", help="Also train a linear probe.")
    ] = True,
    layer: Annotated[
        int | None, typer.Option(help="Hidden state to read. Default: the model's own.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Pixels for folders of towers. Default: their own."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Classify images by an encoder's features: weighted kNN and a linear probe.

    Example: movekd probe base:runs/encoder runs/encoder --images photos/ --features features/
    """
    from movekd.evaluate.encoder.encoders import load_encoder
    from movekd.evaluate.encoder.labelled_images import read_labelled_images
    from movekd.evaluate.encoder.run import run_probe

    quiet_libraries()
    on = resolve_device(device)
    with progress_bar() as progress:
        found = read_labelled_images(images, progress)
        scores = run_probe(
            models,
            lambda model: load_encoder(model, on, layer=layer, image_size=image_size),
            found,
            features=features,
            progress=progress,
            k=k,
            linear=linear,
        )
    if json:
        print_json(
            {
                "images": {
                    "found": found.num_found,
                    "train": len(found.train),
                    "test": len(found.test),
                    "skipped": found.skipped,
                },
                "classes": found.classes,
                "scores": scores,
            }
        )
        return
    print_table(
        f"{images}: {len(found.classes)} classes, {len(found.train)} train, {len(found.test)} test",
        ["model", "probe", "feature", "accuracy", "95% interval", "minus first", "95% interval"],
        [
            [
                score.model,
                score.probe,
                score.feature,
                f"{score.accuracy:.3f}",
                _interval(score.interval),
                "-" if score.difference is None else f"{score.difference:+.3f}",
                _interval(score.difference_interval),
            ]
            for score in scores
        ],
    )
    if found.skipped:
        say(f"{len(found.skipped)} of {found.num_found} files are not used:", err=True)
        for name, reason in list(found.skipped.items())[:10]:
            say(f"{name}: {reason}", err=True)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
