"""`movekd probe --label-maps`: segment test images by an encoder's patch tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from movekd.cli.output import print_json, print_table, progress_bar, say
from movekd.errors import ConfigError

if TYPE_CHECKING:
    from movekd.evaluate.encoder.cached_teacher import CachedTeacher
    from movekd.evaluate.encoder.probed_model import ProbedModel

_MAX_SHOWN = 10


def require_dense(cache: str | None, k: int, linear: bool) -> None:
    """Refuse options of the other probes, which would act on nothing.

    Raises:
        ConfigError: names one.
    """
    given = {
        "--cache": cache is not None,
        "--k": k != 20,
        "--no-linear": not linear,
    }
    if found := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(
            f"{found[0]} is given with --label-maps, which only segments images by patch tokens; "
            "expected one of them. Probe twice, once without --label-maps."
        )


def probe_dense(
    models: Sequence[str],
    load: "Callable[[str], ProbedModel]",
    cached: "Sequence[CachedTeacher]",
    images: Path,
    label_maps: Path,
    *,
    features: Path | None,
    json: bool,
) -> None:
    """Run the dense linear probe on all models, and print its table."""
    from movekd.evaluate.encoder.classify import require_sklearn
    from movekd.evaluate.encoder.dense import run_dense_probe
    from movekd.evaluate.encoder.label_maps import read_mapped_images
    from movekd.evaluate.sample import PERMUTATION, describe, describe_test

    require_sklearn()
    with progress_bar() as progress:
        found = read_mapped_images(images, label_maps, progress)
        for teacher in cached:
            found = found.without(teacher.missing([i.sha256 for i in (*found.train, *found.test)]))
        scores = run_dense_probe(models, load, found, features=features, progress=progress)
    if json:
        counts = {"found": found.num_found, "train": len(found.train), "test": len(found.test)}
        print_json(
            {
                "images": counts | {"skipped": found.skipped},
                "classes": found.num_classes,
                "scores": scores,
                "intervals": f"95%, {describe(len(found.test))}; p: {describe_test(PERMUTATION)}",
            }
        )
        return
    print_table(
        f"{images}: {len(found.train)} train, {len(found.test)} test images with label maps, "
        f"{found.num_classes} classes",
        ["model", "mIoU", "95% interval", "minus first", "95% interval", "p", "C"],
        [
            [
                score.model,
                f"{score.miou:.3f}",
                _interval(score.interval),
                "-" if score.difference is None else f"{score.difference:+.3f}",
                _interval(score.difference_interval),
                "-" if score.p is None else f"{score.p:.4f}",
                f"{score.C:g}",
            ]
            for score in scores
        ],
    )
    say(f"95% intervals {describe(len(found.test))}; p: {describe_test(PERMUTATION)}")
    if found.skipped:
        say(f"{len(found.skipped)} of {found.num_found} files are not used:", err=True)
        for name, reason in list(found.skipped.items())[:_MAX_SHOWN]:
            say(f"{name}: {reason}", err=True)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
