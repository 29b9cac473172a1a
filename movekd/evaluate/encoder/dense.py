"""Segment test images by a linear classifier on patch tokens: the dense linear probe.

Input: a model, images with label maps. Output: the mean intersection over union (mIoU), its 95%
interval, and the paired difference to the first model, with p.

A patch is learned with the share of its pixels in each class. The classifier's values are resized
bilinearly to the label map, and the largest one is the class of a pixel. Nothing else learns, and
no normalisation but one mean and deviation per channel, of train. As in the linear segmentation of
DINOv2, but solved to the end by scikit-learn, so that no learning rate has to be chosen.

Legend: M train images, N test images, P patches on a G x G grid, D channels, K classes, S pixels of
a square map's side, R resamples.

Source: arXiv 2304.07193 (DINOv2), section 7.4, linear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.corpus.transforms import Geometry
from movekd.evaluate.encoder.classify import require_sklearn
from movekd.evaluate.encoder.features import BLOCK_IMAGES
from movekd.evaluate.encoder.kept_tokens import keeping
from movekd.evaluate.encoder.label_maps import IGNORED, MappedImage, MappedImages
from movekd.evaluate.encoder.probed_model import ProbedModel
from movekd.evaluate.image_folder import Progress
from movekd.evaluate.intervals import (
    NUM_RESAMPLES,
    Interval,
    percentiles,
    permutation_p,
    resampled_sums,
)

MAP_SIDE = 224
"""Side in pixels of the square maps that are scored, equal for all models."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""scikit-learn's ``C``; a patch weighs one, without its ignored pixels."""

Counts = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DenseScore:
    """The mIoU of one model.

    Attributes:
        model: as it was given.
        miou: mean over the classes in the label maps of test.
        interval: its 95% bootstrap interval over test images.
        difference: mIoU minus that of the first model; None for the first one, or if the two cut
            images in different ways and so see different pixels.
        difference_interval: its interval, from the same resampled images for both models.
        p: two-sided p of the difference, by a permutation of whole test images.
        C: what the classifier chose.
    """

    model: str
    miou: float
    interval: Interval
    difference: float | None
    difference_interval: Interval | None
    p: float | None
    C: float


def run_dense_probe(
    models: Sequence[str],
    load: Callable[[str], ProbedModel],
    images: MappedImages,
    *,
    features: Path | None = None,
    progress: Progress,
    side: int = MAP_SIDE,
) -> list[DenseScore]:
    """Return the scores of all models, which are in memory one after the other.

    Tokens are kept in the folder ``features``, if one is given.

    Raises:
        MovekdError: a model cannot be loaded, or scikit-learn is missing.
    """
    require_sklearn()
    scores: list[DenseScore] = []
    first: tuple[Geometry, float, npt.NDArray[np.float64], Counts] | None = None
    for model in models:
        loaded = keeping(load(model), features)
        counts_NKK, strength = _confusion(loaded, images, side, model, progress)
        value, values_R = miou(counts_NKK.sum(0)), resampled_miou(counts_NKK)
        compared: tuple[float | None, Interval | None, float | None] = (None, None, None)
        if first is None:
            first = loaded.geometry, value, values_R, counts_NKK
        elif loaded.geometry == first[0]:
            p = permuted_p(counts_NKK, first[3])
            compared = value - first[1], percentiles(values_R - first[2]), p
        del loaded
        scores.append(DenseScore(model, value, percentiles(values_R), *compared, strength))
    return scores


def miou(counts_KK: Counts) -> float:
    """Return the mean intersection over union of the classes that occur in the label maps.

    Args:
        counts_KK: pixels by true class (row) and predicted class (column).
    """
    from sklearn.metrics import jaccard_score

    if not counts_KK.any():  # every pixel of the drawn images is ignored
        return float("nan")
    true, predicted = np.indices(counts_KK.shape).reshape(2, -1)
    value = jaccard_score(
        true,
        predicted,
        labels=np.flatnonzero(counts_KK.sum(1)),
        average="macro",
        sample_weight=counts_KK.ravel(),
    )
    return float(value)


def resampled_miou(
    counts_NKK: Counts, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Return what ``miou`` says of test images drawn with replacement, float64 (R,).

    Thousands of calls of scikit-learn would take longer than the probe. The draws depend on the
    number of images only, so those of two models are pairs.
    """
    return _miou_of(resampled_sums(_areas(counts_NKK), num_resamples, seed))


def permuted_p(counts_NKK: Counts, first_NKK: Counts) -> float:
    """Return the two-sided p of the difference in mIoU, by a permutation of whole images."""
    return permutation_p(_areas(counts_NKK), _areas(first_NKK), _miou_of)


def _areas(counts_NKK: Counts) -> npt.NDArray[np.float64]:
    """Return per image the pixels that are right, true and predicted, by class: (N, 3 K)."""
    right_NK = np.diagonal(counts_NKK, axis1=1, axis2=2)
    return np.concatenate([right_NK, counts_NKK.sum(2), counts_NKK.sum(1)], 1).astype(np.float64)


def _miou_of(sums_RS: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mIoU of sums of ``_areas``; NaN without any class."""
    both_RK, true_RK, predicted_RK = np.split(sums_RS, 3, 1)
    with np.errstate(invalid="ignore"):  # a class that is not drawn
        values_RK = both_RK / (true_RK + predicted_RK - both_RK)
        means_R: npt.NDArray[np.float64] = np.mean(values_RK, axis=1, where=true_RK > 0)
    return means_R


def _confusion(
    model: ProbedModel, images: MappedImages, side: int, name: str, progress: Progress
) -> tuple[Counts, float]:
    """Return the pixels of each test image by true and predicted class, and the ``C``."""
    train_MPD = _encode(model, images, images.train, f"{name}: train", progress)
    grid = round(train_MPD.shape[1] ** 0.5)
    fine = grid * max(1, round(side / grid))  # so that a patch holds whole pixels
    shares_MPK = np.stack(
        [
            patch_shares(images.square_map(i, fine, model.geometry), grid, images.num_classes)
            for i in images.train
        ]
    )

    def score(fitted: "_Linear", tokens_BPD: Tokens, some: Sequence[MappedImage]) -> Counts:
        found = []
        for tokens_PD, image in zip(tokens_BPD, some, strict=True):
            predicted_SS = fitted.predict(tokens_PD, side)
            true_SS = images.square_map(image, side, model.geometry)
            found.append(count_pixels(true_SS, predicted_SS, images.num_classes))
        return np.stack(found)

    is_held = np.arange(len(train_MPD)) % 5 == 1
    strength, num_left = STRENGTHS[-1], int(shares_MPK[~is_held].any((0, 1)).sum())
    if is_held.any() and num_left > 1:
        held = [image for image, chosen in zip(images.train, is_held, strict=True) if chosen]
        tried = []
        for number, C in enumerate(STRENGTHS):
            progress(f"{name}: choose C", number + 1, len(STRENGTHS))
            fitted = _Linear(train_MPD[~is_held], shares_MPK[~is_held], C)
            tried.append(miou(score(fitted, train_MPD[is_held], held).sum(0)))
        strength = STRENGTHS[int(np.argmax(tried))]
    fitted = _Linear(train_MPD, shares_MPK, strength)
    del train_MPD
    counts = []
    for start in range(0, len(images.test), BLOCK_IMAGES):
        some = images.test[start : start + BLOCK_IMAGES]
        tokens_BPD = _encode(model, images, some, f"{name}: test", None)
        counts.append(score(fitted, tokens_BPD, some))
        progress(f"{name}: test", start + len(some), len(images.test))
    return np.concatenate(counts), strength


def _encode(
    model: ProbedModel,
    images: MappedImages,
    some: Sequence[MappedImage],
    label: str,
    progress: Progress | None,
) -> Tokens:
    """Return the patch tokens of images, float32 (B, P, D)."""
    parts = []
    for start in range(0, len(some), BLOCK_IMAGES):
        block = some[start : start + BLOCK_IMAGES]
        output = model.encode([i.sha256 for i in block], (images.read(i.name) for i in block))
        parts.append(output.tokens_BND.float().cpu().numpy())
        if progress is not None:
            progress(label, start + len(block), len(some))
    return np.concatenate(parts)


def patch_shares(labels_SS: npt.NDArray[np.uint8], grid: int, num_classes: int) -> Any:
    """Return the share of each patch's pixels in each class, float32 (P, K).

    Ignored pixels are in no class.
    """
    size = len(labels_SS) // grid
    patches_PX = (
        labels_SS.reshape(grid, size, grid, size).swapaxes(1, 2).reshape(grid * grid, size * size)
    )
    counts_PK = np.stack([(patches_PX == k).sum(1) for k in range(num_classes)], 1)
    return (counts_PK / size**2).astype(np.float32)


def count_pixels(true_SS: Any, predicted_SS: Any, num_classes: int) -> Counts:
    """Return how many pixels have each true class (row) and predicted class (column)."""
    is_known = true_SS != IGNORED
    pairs = true_SS[is_known].astype(np.int64) * num_classes + predicted_SS[is_known]
    counts_KK: Counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, -1)
    return counts_KK


class _Linear:
    """A logistic regression on standardised patch tokens.

    Args:
        tokens_MPD: patch tokens.
        shares_MPK: weight of each patch for each class.
        C: scikit-learn's inverse of the regularisation.
    """

    def __init__(self, tokens_MPD: Tokens, shares_MPK: Any, C: float) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        at, labels = np.nonzero(shares_MPK.reshape(-1, shares_MPK.shape[-1]))
        tokens_XD = tokens_MPD.reshape(-1, tokens_MPD.shape[-1])
        self._scaler = StandardScaler().fit(tokens_XD)
        weights = shares_MPK.reshape(-1, shares_MPK.shape[-1])[at, labels]
        self._model = LogisticRegression(C=C, max_iter=5000)
        self._model.fit(self._scaler.transform(tokens_XD[at]), labels, weights)

    def predict(self, tokens_PD: Tokens, side: int) -> Any:
        """Return the class of each pixel of a square, int64 (S, S)."""
        values = self._model.decision_function(self._scaler.transform(tokens_PD))
        if values.ndim == 1:  # two classes have one value
            values = np.stack([-values, values], 1) / 2
        grid = round(len(tokens_PD) ** 0.5)
        values_KGG: Tensor = torch.from_numpy(values).T.reshape(1, -1, grid, grid)
        resized = torch.nn.functional.interpolate(
            values_KGG, (side, side), mode="bilinear", align_corners=False
        )
        return self._model.classes_[resized[0].numpy().argmax(0)]
