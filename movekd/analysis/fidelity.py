"""Measure what each codec and grid loses of a teacher's features: `movekd cache fidelity`.

Input: the spec of a teacher and a corpus. Output: errors of the features, and the cosine between
the distillation gradients from decoded and from exact features. Nothing is written.

The teacher runs on some images after the same calibration as in a build. Every codec on the native
grid, the student's and the spec's encodes and decodes the features.

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
from movekd.extract.shard_buffer import mean_attention
from movekd.extract.spec_defaults import with_defaults
from movekd.teachers import load_teacher


@dataclass(frozen=True)
class FidelityReport:
    """All codecs and grids for one teacher."""

    teacher: str
    num_images: int
    views: Views
    """Which views of each image were measured."""
    calibration_images: int
    shared_images: int
    """Images used for both calibration and measurement, because the corpus is small."""
    skipped: Mapping[str, str]
    """Key -> why the image could not be read."""
    random_weights: bool
    ways: tuple[Fidelity, ...]
    refused: Mapping[str, str]
    """Codec and grid -> why they cannot store these features."""


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
        corpus: the images; ``draw_images`` draws from them.
        geometry: geometry of the planned cache.
        views: views of the planned cache; all views of the drawn images are measured.
        options: device, dtype and batch size of the teacher.
        num_images: how many images to measure; fewer if the corpus has fewer.
        student_grid: side of the student's grid.
        student_width: channels of the student.
        seed: seed of the student.
        progress: called after each batch.

    Raises:
        CacheError: the corpus is empty, or none of the images can be read.
    """
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image to measure with; pack images first.")
    spec = with_defaults(spec)
    calibration, images = draw_images(corpus, spec.calibration_images, num_images)
    teacher = load_teacher(spec, options.device, options.dtype)
    unreadable: dict[int, str] = {}

    def live(chosen: npt.NDArray[np.int64], label: str) -> Iterator[LiveFeatures]:
        label = f"{spec.name}: {label}"
        widths, heights = (corpus.index.take(side, chosen) for side in ("width", "height"))
        index, views_of = list_views(widths, heights, views)
        images = chosen[index]
        return live_features(
            teacher, corpus, geometry, images, views_of, options, unreadable, progress, label
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
    trials = {
        (grid, codec): CodecTrial(codec, grid, grid == native, student_grid)
        for grid, codec in itertools.product(stats, dict.fromkeys((*codec_names(), spec.codec)))
    }
    for features in live(images, "measure"):
        of_images = corpus.index.take("key", np.asarray(features.images)).to_pylist()
        features = mean_attention(features, spec)
        keys = [  # they seed the student, so every view needs another one
            f"{key} {view}" if view else key
            for key, view in zip(of_images, features.views, strict=True)
        ]
        _measure(features, keys, stats, gradient, trials)
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
            trial.result((grid, codec) == (asked, spec.codec))
            for (grid, codec), trial in trials.items()
            if trial.refusal is None
        ),
        refused={
            f"{codec} on {grid}x{grid}": trial.refusal
            for (grid, codec), trial in trials.items()
            if trial.refusal is not None
        },
    )


def draw_images(
    corpus: Corpus, calibration_images: int, num_images: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the positions of the images to calibrate with, as in a build, and of those to measure.

    Keys are hashes, so their order is a uniform draw. The build calibrates with the smallest keys.
    The next ones are measured; in a small corpus, the largest ones.
    """
    order = by_key(corpus)
    first = max(0, min(calibration_images, len(order) - num_images))
    return np.sort(order[:calibration_images]), np.sort(order[first : first + num_images])


def _calibrate(
    batches: Iterator[LiveFeatures], spec: CacheSpec, student_grid: int
) -> tuple[int, dict[int, ChannelStats]]:
    """Return the native grid, and the channel statistics of each measured grid."""
    native, statistics = 0, dict[int, StatsAccumulator]()
    for features in batches:
        native = features.grid
        asked = native if spec.grid == "native" else spec.grid
        for grid in dict.fromkeys((native, student_grid, asked)):
            tokens_BND = features.resize(grid).tokens_BND
            statistics.setdefault(grid, StatsAccumulator()).add(tokens_BND)
    if not statistics:
        raise CacheError("no image of the calibration could be read; check the corpus.")
    return native, {grid: found.result(spec.std_floor or 0.0) for grid, found in statistics.items()}


def _measure(
    features: LiveFeatures,
    keys: list[str],
    stats: Mapping[int, ChannelStats],
    gradient: KDGradient,
    trials: Mapping[tuple[int, str], CodecTrial],
) -> None:
    for grid, grid_stats in stats.items():
        exact = features.resize(grid)
        of_grid = [trial for (side, _), trial in trials.items() if side == grid]
        exact_targets = of_grid[0].exact_targets(exact, grid_stats)
        expected = gradient.all(keys, exact_targets, exact_targets)
        for trial in of_grid:
            decoded = trial.store(exact, grid_stats)
            if decoded is not None:
                trial.compare(expected, gradient.all(keys, decoded, exact_targets))
