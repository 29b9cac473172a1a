"""What storing a teacher's features loses, and what of that a training would notice:
`movekd cache fidelity`.

Comes in: the spec of a teacher and a corpus. The teacher runs live on some images, after a
calibration like the build's; every codec on the native, the student's and the spec's grid encodes
the features and decodes them again. Goes out: errors of the features, and the cosine between the
gradients that a distillation takes from decoded and from exact ones. Nothing is written.

Legend: B batch, N tokens, D channels, H heads.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from movekd.analysis.codec_trial import CodecTrial, Fidelity
from movekd.analysis.kd_gradient import KDGradient
from movekd.cache.codecs import codec_names
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats, StatsAccumulator
from movekd.corpus.anyres import Views, list_views
from movekd.corpus.index import Corpus
from movekd.corpus.transforms import Geometry
from movekd.errors import CacheError
from movekd.extract.calibrate import by_key
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.run_teacher import LiveFeatures, live_features
from movekd.teachers import load_teacher


@dataclass(frozen=True)
class FidelityReport:
    """Every way of storing one teacher, side by side."""

    teacher: str
    num_images: int
    views: Views
    """Of each image, all measured with."""
    calibration_images: int
    shared_images: int
    """Images measured with that were calibrated with, too: the corpus has no others."""
    skipped: Mapping[str, str]
    """Key -> why the image could not be read."""
    random_weights: bool
    ways: tuple[Fidelity, ...]
    refused: Mapping[str, str]
    """A way that cannot hold these features -> why."""


def measure_fidelity(
    spec: CacheSpec,
    corpus: Corpus,
    *,
    geometry: Geometry,
    views: Views = "base",
    options: BuildOptions,
    num_images: int = 32,
    student_grid: int = 24,
    student_width: int = 1024,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> FidelityReport:
    """Return what each codec and grid loses of a teacher's features.

    Args:
        spec: the teacher; its ``calibration_images`` fix the channel statistics, as in a build.
        corpus: where the images are drawn from, see ``draw_images``.
        geometry: of the cache to be.
        views: of the cache to be; all views of the images are measured with.
        options: device, dtype and batch size of the teacher.
        num_images: how many to measure with; fewer if the corpus has fewer.
        student_grid: side of the student's grid.
        student_width: channels of the student.
        seed: of the student.
        progress: called after each batch.

    Raises:
        CacheError: the corpus is empty, or none of the images can be read.
    """
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image to measure with.")
    calibration, images = draw_images(corpus, spec.calibration_images, num_images)
    teacher = load_teacher(spec, options.device, options.dtype)
    unreadable: dict[int, str] = {}

    def live(chosen: npt.NDArray[np.int64], what: str) -> Iterator[LiveFeatures]:
        what = f"{spec.name}: {what}"
        widths, heights = (corpus.index.take(side, chosen) for side in ("width", "height"))
        places, of_each = list_views(widths, heights, views)
        return live_features(
            teacher, corpus, geometry, chosen[places], of_each, options, unreadable, progress, what
        )

    native, stats = _calibrate(live(calibration, "calibrate"), spec, student_grid)
    stats = {grid: found.to(torch.device(options.device)) for grid, found in stats.items()}
    gradient = KDGradient(
        student_grid**2,
        student_width,
        native**2,
        next(iter(stats.values())).mean_D.shape[0],
        seed=seed,
        device=options.device,
    )
    ways = {
        (grid, codec): CodecTrial(codec, grid, grid == native, student_grid)
        for grid, codec in itertools.product(stats, codec_names())
    }
    for features in live(images, "measure"):
        of_images = corpus.index.take("key", np.asarray(features.images)).to_pylist()
        keys = [
            f"{key} {view}" if view else key  # a student of its own for every view
            for key, view in zip(of_images, features.views, strict=True)
        ]
        _measure(features, keys, stats, gradient, ways)
    if all(image in unreadable for image in images.tolist()):
        raise CacheError(
            f"none of {len(images)} images of {corpus.data_dir} can be read; check the corpus with "
            "`movekd shards ls`."
        )
    asked = native if spec.grid == "native" else spec.grid
    return FidelityReport(
        teacher=spec.name,
        num_images=sum(image not in unreadable for image in images.tolist()),
        views=views,
        calibration_images=len(calibration),
        shared_images=len(np.intersect1d(calibration, images)),
        skipped={corpus.key(at): why for at, why in sorted(unreadable.items())},
        random_weights=spec.weights == "random",
        ways=tuple(
            way.result((grid, codec) == (asked, spec.codec))
            for (grid, codec), way in ways.items()
            if way.refusal is None
        ),
        refused={
            f"{codec} on {grid}x{grid}": way.refusal
            for (grid, codec), way in ways.items()
            if way.refusal is not None
        },
    )


def draw_images(
    corpus: Corpus, calibration_images: int, num_images: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the positions to calibrate with, which are the build's, and those to measure with.

    Keys are hashes, so their order is a uniform draw. The build calibrates with the smallest; the
    next ones are measured with. Where the corpus does not go so far, the largest are.
    """
    order = by_key(corpus)
    first = max(0, min(calibration_images, len(order) - num_images))
    return np.sort(order[:calibration_images]), np.sort(order[first : first + num_images])


def _calibrate(
    batches: Iterator[LiveFeatures], spec: CacheSpec, student_grid: int
) -> tuple[int, dict[int, ChannelStats]]:
    """Return the native grid, and the channel statistics of each grid that is looked at."""
    native, statistics = 0, dict[int, StatsAccumulator]()
    for features in batches:
        native = features.grid
        asked = native if spec.grid == "native" else spec.grid
        for grid in dict.fromkeys((native, student_grid, asked)):
            tokens_BND = features.resize_output(grid).tokens_BND
            statistics.setdefault(grid, StatsAccumulator()).add(tokens_BND)
    if not statistics:
        raise CacheError("no image of the calibration could be read; check the corpus.")
    return native, {grid: found.result() for grid, found in statistics.items()}


def _measure(
    features: LiveFeatures,
    keys: list[str],
    stats: Mapping[int, ChannelStats],
    gradient: KDGradient,
    ways: Mapping[tuple[int, str], CodecTrial],
) -> None:
    """Put a batch through every way of storing."""
    for grid, grid_stats in stats.items():
        exact = features.resize_output(grid)
        of_grid = [way for (side, _), way in ways.items() if side == grid]
        goals = of_grid[0].exact_targets(exact, grid_stats)
        expected = gradient.all(keys, goals, goals)
        for way in of_grid:
            decoded = way.store(exact, grid_stats)
            if decoded is not None:
                way.compare(expected, gradient.all(keys, decoded, goals))
