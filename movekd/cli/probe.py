"""`movekd probe`: what a vision encoder is worth without a language model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from movekd.cli.options import (
    Device,
    Json,
    check_resize_mode,
    read_specs,
    resolve_device,
)
from movekd.cli.output import print_json, progress_bar, quiet_libraries, say
from movekd.cli.probe_dense import probe_dense, require_dense
from movekd.cli.probe_table import as_json, show
from movekd.errors import ConfigError

if TYPE_CHECKING:
    from movekd.corpus.transforms import Geometry
    from movekd.evaluate.encoder.cached_teacher import CachedTeacher
    from movekd.evaluate.encoder.labelled_images import LabelledImages
    from movekd.evaluate.encoder.probed_model import ProbedModel
    from movekd.evaluate.encoder.teacher_fit import FitImages

_TEACHER = "teacher:"


def probe(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Runs, exports of format hf or encoder, Hugging Face folders of vision towers, "
            "base:RUN (the tower that a run started from), teacher:SPEC (a name in cache_specs/ "
            "or a YAML file), cache:DIR#TEACHER. All are compared with the first.",
        ),
    ],
    images: Annotated[
        Path,
        typer.Option(
            help="Folder with train/CLASS/ and test/CLASS/ of image files, or a CSV file with the "
            "columns file_name, label and split (train or test)."
        ),
    ],
    label_maps: Annotated[
        Path | None,
        typer.Option(
            help="Folder of label maps, a PNG at the path of each image; 255 is ignored. Segment "
            "the test images by patch tokens, and do nothing else. --images needs no CLASS/ then."
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep features in; the next probe reads them. With --label-maps and "
            "--cache it keeps all tokens: 4 bytes x tokens x channels per image. Default: none."
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of kNN.")] = 20,
    linear: Annotated[
        bool, typer.Option("--linear/--no-linear", help="Also train a linear probe.")
    ] = True,
    cache: Annotated[
        str | None,
        typer.Option(help="Cache to whose teachers the fit of each model is measured, too."),
    ] = None,
    shards: Annotated[
        Path | None,
        typer.Option(
            help="Corpus of the images that the fit is measured on. Default: those of --images "
            "that the cache holds."
        ),
    ] = None,
    fit_images: Annotated[
        int | None,
        typer.Option(min=20, max=5_000, help="Most images to measure the fit on. Default: 500."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Hidden state to read; a teacher's spec names its own. Default: the model's own."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Pixels for folders of towers. Default: their own."),
    ] = None,
    resize_mode: Annotated[
        str | None,
        typer.Option(
            help="How images become square for teacher:SPEC: crop, pad, stretch or longest_side. "
            "Default: crop."
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Classify images by an encoder's features: weighted kNN and a linear probe.

    Example: movekd probe base:runs/encoder runs/encoder --images photos/ --features features/
    """
    from movekd.evaluate.encoder.features import require_features_folder
    from movekd.evaluate.encoder.labelled_images import read_labelled_images
    from movekd.evaluate.encoder.run import run_probe
    from movekd.evaluate.encoder.teacher_fit import TeacherFits

    quiet_libraries()
    _require_used(models, layer, image_size, resize_mode)
    for option, value in (("--shards", shards), ("--fit-images", fit_images)):
        if value is not None and cache is None:
            raise ConfigError(
                f"{option} is {value}, but no --cache is given; expected both, to measure the fit "
                f"to its teachers. Give the cache, or leave {option} out."
            )
    on, geometry = resolve_device(device), check_resize_mode(resize_mode)
    cached = _cached(models)
    loaders = {
        model: cached.get(model) or _loader(model, on, layer, image_size, geometry)
        for model in models
    }
    if features is not None:
        require_features_folder(features)
    if label_maps is not None:
        require_dense(cache, k, linear)
        probe_dense(
            models,
            lambda model: _loaded(loaders[model]),
            list(cached.values()),
            images,
            label_maps,
            features=features,
            json=json,
        )
        return
    with progress_bar() as progress:
        found = read_labelled_images(images, progress)
        for teacher in cached.values():
            found = found.without(teacher.missing([i.sha256 for i in (*found.train, *found.test)]))
        fit = None
        if cache is not None:
            fit = _fit_images(cache, shards, found, fit_images or 500, list(cached.values()))
        fits = None if fit is None else TeacherFits(fit, progress, features)
        scores = run_probe(
            models,
            lambda model: _loaded(loaders[model]),
            found,
            features=features,
            progress=progress,
            k=k,
            linear=linear,
            also=[] if fits is None else [fits.measure],
        )
    fit_scores = [] if fits is None else fits.scores
    if json:
        print_json(as_json(found, scores, fit, fit_scores))
    else:
        show(images, found, scores, fit, fit_scores)


def _require_used(
    models: Sequence[str], layer: int | None, image_size: int | None, resize_mode: str | None
) -> None:
    """Refuse an option that would act on none of the models."""
    is_teacher = [model.startswith((_TEACHER, "cache:")) for model in models]
    for option, value in (("--layer", layer), ("--image-size", image_size)):
        if value is not None and all(is_teacher):
            raise ConfigError(
                f"{option} is {value}, but all models are teachers, whose specs name their own; "
                "expected a run or a tower among them. Leave it out, or change the spec."
            )
    if resize_mode is not None and not any(model.startswith(_TEACHER) for model in models):
        raise ConfigError(
            f"--resize-mode is {resize_mode}, but it acts only on {_TEACHER}SPEC, and none is "
            "given; expected one. Leave it out: the other models name their own."
        )


def _cached(models: Sequence[str]) -> "dict[str, CachedTeacher]":
    from movekd.evaluate.encoder import cached_teacher

    return {
        model: cached_teacher.open_cached_teacher(model)
        for model in models
        if model.startswith(cached_teacher.PREFIX)
    }


def _loader(
    model: str, device: str, layer: int | None, image_size: int | None, geometry: "Geometry"
) -> "Callable[[], ProbedModel]":
    """Return what loads a model, after what can be checked without loading it."""
    if model.startswith(_TEACHER):
        spec = read_specs([model.removeprefix(_TEACHER)])[0]
        if spec.weights == "random":
            say(f"{model} has RANDOM WEIGHTS: not this teacher's real features", err=True)

        def load_teacher() -> "ProbedModel":
            from movekd.analysis.live_teacher import LiveTeacher

            return LiveTeacher(spec, geometry, device)

        return load_teacher
    from movekd.evaluate.encoder.encoders import load_encoder, require_encoder

    require_encoder(model, image_size)
    return lambda: load_encoder(model, device, layer=layer, image_size=image_size)


def _loaded(model: "CachedTeacher | Callable[[], ProbedModel]") -> "ProbedModel":
    return model() if callable(model) else model


def _fit_images(
    cache: str,
    shards: Path | None,
    found: "LabelledImages",
    max_images: int,
    also_in: "list[CachedTeacher]",
) -> "FitImages":
    import pyarrow as pa

    from movekd.cache.reader import open_cache
    from movekd.corpus.index import open_corpus
    from movekd.evaluate.encoder.teacher_fit import choose_fit_images

    if shards is None:
        name_of = {image.sha256: image.name for image in (*found.train, *found.test)}
        asked = pa.array(list(name_of), pa.string())

        def read(keys: Sequence[str]) -> Iterator[bytes]:
            return (found.read(name_of[key]) for key in keys)

    else:
        corpus = open_corpus(shards)
        asked = corpus.index["key"].combine_chunks()

        def read(keys: Sequence[str]) -> Iterator[bytes]:
            return map(corpus.read_image, corpus.rows(keys).tolist())

    return choose_fit_images(open_cache(cache), asked, read, max_images, also_in)
