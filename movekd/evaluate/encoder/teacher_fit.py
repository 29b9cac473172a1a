"""Measure how well a model's tokens fit those of each teacher of a cache.

Input: models, one after the other, and images that lie in the cache. Output: for each model and
teacher R2 and linear CKA with 95% intervals, and their differences to the first model.

A ridge regression predicts the teacher's standardised tokens, on the model's grid, from the
model's patch tokens. It learns on four fifths of the images and is read on the others. A run's own
heads are not used: its base has none, and both must be measured with one instrument.

Legend: I images, N tokens per image, D channels of the model, T of the teacher, R resamples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from movekd.cache.codecs.int8 import GROUP_CHANNELS
from movekd.cache.codecs.interface import ERROR_LIMIT
from movekd.cache.grid import resize_tokens
from movekd.cache.layout import grid_side
from movekd.cache.reader import FeatureCache
from movekd.distill.token_loss import limit
from movekd.errors import CacheError, ConfigError
from movekd.evaluate.encoder.cached_teacher import CachedTeacher
from movekd.evaluate.encoder.kept_tokens import keeping
from movekd.evaluate.encoder.probed_model import ProbedModel
from movekd.evaluate.encoder.token_fit import STRENGTHS, Moments, Prediction, linear_cka
from movekd.evaluate.image_folder import Progress
from movekd.evaluate.intervals import NUM_RESAMPLES, Interval, percentiles

MIN_IMAGES = 20
_FOLDS, _BLOCK_IMAGES = 5, 16
_READ, _CHOOSE, _LEARN = 0, 1, 2
_MAX_CKA_TOKENS = 8192


@dataclass(frozen=True)
class FitImages:
    """Images of which every teacher has features.

    Attributes:
        teachers: the teachers of the cache.
        keys: SHA-256 of each image's file, ascending.
        read: keys -> their files, in order.
        num_found: images that were found.
        skipped: why others are not used -> how many.
    """

    teachers: Sequence[CachedTeacher]
    keys: list[str]
    read: Callable[[Sequence[str]], Iterable[bytes]]
    num_found: int
    skipped: Mapping[str, int]


def choose_fit_images(
    cache: FeatureCache,
    keys: pa.Array,
    read: Callable[[Sequence[str]], Iterable[bytes]],
    max_images: int,
    also_in: Sequence[CachedTeacher] = (),
) -> FitImages:
    """Return at most ``max_images`` images that a cache holds, drawn by their keys.

    Args:
        cache: all of its teachers are measured.
        keys: SHA-256 of each image's file.
        read: keys -> their files, in order.
        max_images: the images with the smallest keys are taken; keys are hashes. At least
            ``MIN_IMAGES``.
        also_in: teachers that need features of the images, too.

    Raises:
        CacheError: the cache holds no teacher.
        ConfigError: fewer than ``MIN_IMAGES`` images are left.
    """
    if not cache.teachers:
        raise CacheError(f"{cache.url} holds no teacher; build one with `movekd cache build`.")
    teachers = [CachedTeacher(cache, name) for name in cache.teachers]
    left, skipped = pc.unique(keys), {}
    num_found = len(left)
    for teacher in (*teachers, *also_in):
        is_missing = teacher.is_missing(left)
        if num := int(is_missing.sum()):
            reason = f"{teacher.cache.url}#{teacher.teacher} has no features of it"
            skipped[reason] = num
            left = left.filter(pa.array(~is_missing))
    if len(left) < MIN_IMAGES:
        raise ConfigError(
            f"{len(left)} of {num_found} images have features of all teachers in {cache.url}; "
            f"expected {MIN_IMAGES} or more to measure the fit on. Give the corpus that the cache "
            "was built from with --shards."
        )
    if len(left) > max_images:
        skipped[f"more than {max_images} were not asked for"] = len(left) - max_images
        left = left.take(pc.sort_indices(left)[:max_images])
    return FitImages(teachers, sorted(left.to_pylist()), read, num_found, skipped)


@dataclass(frozen=True)
class FitScore:
    """How well one model fits one teacher, by one measure.

    Attributes:
        model: as it was given.
        teacher: name in the cache.
        measure: r2 or cka.
        value: on the images that the regression did not learn from.
        interval: its 95% bootstrap interval over these images.
        difference: value minus that of the first model; None for the first one.
        difference_interval: its interval, from the same resampled images for both models.
        channel_groups: of r2: the value of each group of 128 channels, the last may be smaller.
        strength: of r2: the penalty that was chosen.
    """

    model: str
    teacher: str
    measure: str
    value: float
    interval: Interval
    difference: float | None
    difference_interval: Interval | None
    channel_groups: list[float] | None = None
    strength: float | None = None


class TeacherFits:
    """Measures models that are loaded one after the other.

    Args:
        images: what to measure on.
        progress: called after each batch.
        features: folder that keeps the models' tokens; None: they are not kept.

    Attributes:
        scores: of all models so far.
    """

    def __init__(self, images: FitImages, progress: Progress, features: Path | None = None) -> None:
        self.scores: list[FitScore] = []
        self._images, self._progress, self._features = images, progress, features
        self._first: dict[tuple[str, str], npt.NDArray[np.float64]] | None = None
        self._part = np.arange(len(images.keys)) % _FOLDS
        self._weights_RI = _resampled(int((self._part == _READ).sum()))

    def measure(self, name: str, model: ProbedModel) -> None:
        """Add the scores of a model."""
        read_IND, moments = self._encode(name, keeping(model, self._features))
        read_keys = [k for k, p in zip(self._images.keys, self._part, strict=True) if p == _READ]
        values: dict[tuple[str, str], npt.NDArray[np.float64]] = {}
        for teacher in self._images.teachers:
            learn, choose = moments[teacher.teacher]
            strength = min(STRENGTHS, key=lambda s: choose.squared_error(learn.ridge(s)))
            weights = (learn + choose).ridge(strength)
            prediction, cka_R = self._read(teacher, weights, read_keys, read_IND)
            width = prediction.errors_IT.shape[1]
            groups = [
                float(prediction.r2(self._weights_RI[:1], slice(start, start + GROUP_CHANNELS)))
                for start in range(0, width, GROUP_CHANNELS)
            ]
            r2_R = prediction.r2(self._weights_RI)
            for measure, found, more in (
                ("r2", r2_R, {"channel_groups": groups, "strength": strength}),
                ("cka", cka_R, {}),
            ):
                values[teacher.teacher, measure] = found.numpy()
                self._add(name, teacher.teacher, measure, found.numpy(), **more)
        self._first = self._first or values

    def _encode(
        self, name: str, model: ProbedModel
    ) -> tuple[Tensor, dict[str, tuple[Moments, Moments]]]:
        """Return the tokens of the images to read on, and the sums over all others."""
        read: list[Tensor] = []
        sums: dict[tuple[str, int], Moments] = {}
        keys = self._images.keys
        for start in range(0, len(keys), _BLOCK_IMAGES):
            block = keys[start : start + _BLOCK_IMAGES]
            part = torch.from_numpy(self._part[start : start + _BLOCK_IMAGES]).clamp(max=_LEARN)
            tokens_IND = model.encode(block, self._images.read(block)).tokens_BND.float().cpu()
            read.append(tokens_IND[part == _READ].clone())
            for teacher in self._images.teachers:
                goals_INT = _goals(teacher, block, tokens_IND.shape[1])
                for at in (_CHOOSE, _LEARN):
                    if not (some := part == at).any():
                        continue
                    added = Moments.of(
                        tokens_IND[some].flatten(0, 1), goals_INT[some].flatten(0, 1)
                    )
                    before = sums.get((teacher.teacher, at))
                    sums[teacher.teacher, at] = added if before is None else before + added
            self._progress(f"{name}: fit", start + len(block), len(keys))
        names = [teacher.teacher for teacher in self._images.teachers]
        return torch.cat(read), {n: (sums[n, _LEARN], sums[n, _CHOOSE]) for n in names}

    def _read(
        self, teacher: CachedTeacher, weights: Tensor, keys: list[str], read_IND: Tensor
    ) -> tuple[Prediction, Tensor]:
        """Return the errors on the images to read on, and their CKA for each resample."""
        num_images, num_tokens = read_IND.shape[:2]
        count = max(1, min(num_tokens, _MAX_CKA_TOKENS // num_images))
        drawn = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))[:count]
        parts, sample = [], []
        for start in range(0, num_images, _BLOCK_IMAGES):
            some = slice(start, start + _BLOCK_IMAGES)
            goals_INT = _goals(teacher, keys[some], num_tokens)
            parts.append(Prediction.of(weights, read_IND[some], goals_INT))
            sample.append(goals_INT[:, drawn])
        cka_R = linear_cka(read_IND[:, drawn], torch.cat(sample), self._weights_RI)
        return Prediction.join(parts), cka_R

    def _add(
        self,
        model: str,
        teacher: str,
        measure: str,
        values_R: npt.NDArray[np.float64],
        **more: object,
    ) -> None:
        difference: float | None = None
        between: Interval | None = None
        if self._first is not None:
            differences_R = values_R - self._first[teacher, measure]
            difference, between = float(differences_R[0]), percentiles(differences_R[1:])
        value, interval = float(values_R[0]), percentiles(values_R[1:])
        score = FitScore(model, teacher, measure, value, interval, difference, between, **more)  # type: ignore[arg-type]
        self.scores.append(score)


def _goals(teacher: CachedTeacher, keys: Sequence[str], num_tokens: int) -> Tensor:
    """Return the teacher's standardised tokens on a grid, limited to 8 sigma: (I, N, T)."""
    tokens_IMT = teacher.targets(keys).standardised_BND
    return limit(resize_tokens(tokens_IMT, grid_side(num_tokens)), ERROR_LIMIT)


def _resampled(num_images: int, seed: int = 0) -> Tensor:
    """Return how often each image counts: first each once, then in each resample, (1 + R, I)."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_images, [1 / num_images] * num_images, NUM_RESAMPLES)
    return torch.from_numpy(np.concatenate([np.ones((1, num_images)), drawn]))
