"""Probe encoders on labelled images and compare them: `movekd probe`.

Input: names of models, labelled images. Output: for each model, feature and probe the accuracy, its
95% interval, and the paired difference to the first model with its interval and p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from movekd.evaluate.encoder.classify import (
    NUM_NEIGHBOURS,
    knn,
    linear_probe,
    require_neighbours,
    require_sklearn,
)
from movekd.evaluate.encoder.features import encode_images
from movekd.evaluate.encoder.labelled_images import LabelledImages
from movekd.evaluate.encoder.probed_model import ProbedModel
from movekd.evaluate.image_folder import Progress
from movekd.evaluate.intervals import Interval, bootstrap_interval, mcnemar_p


@dataclass(frozen=True)
class ProbeScore:
    """The score of one probe on one feature of one model.

    Attributes:
        model: as it was given.
        probe: knn or linear.
        feature: cls or patches (their mean).
        accuracy: fraction of test images that are right.
        interval: its 95% bootstrap interval over test images, not over training seeds.
        difference: accuracy minus that of the first model; None for the first one, or if the first
            one lacks the feature.
        difference_interval: its interval, from the same resampled images for both models.
        p: two-sided p of the difference, by McNemar's exact test over test images.
        C: what the linear probe chose.
    """

    model: str
    probe: str
    feature: str
    accuracy: float
    interval: Interval
    difference: float | None = None
    difference_interval: Interval | None = None
    p: float | None = None
    C: float | None = None


def run_probe(
    models: Sequence[str],
    load: Callable[[str], ProbedModel],
    images: LabelledImages,
    *,
    features: Path | None,
    progress: Progress,
    k: int = NUM_NEIGHBOURS,
    linear: bool = True,
    also: Sequence[Callable[[str, ProbedModel], None]] = (),
) -> list[ProbeScore]:
    """Return the scores of all models, which are in memory one after the other.

    Each of ``also`` measures each model while it is loaded.

    Raises:
        MovekdError: a model cannot be loaded, k does not fit, or scikit-learn is missing.
    """
    if linear:
        require_sklearn()
    require_neighbours(k, len(images.train))
    train_labels, test_labels = (
        np.array([image.label for image in split], np.int64)
        for split in (images.train, images.test)
    )
    first: dict[tuple[str, str], npt.NDArray[np.bool_]] = {}
    scores = []
    for at, model in enumerate(models):
        encoder = load(model)
        train, test = (
            encode_images(encoder, split, images.read, features, progress, f"{model}: {name}")
            for name, split in (("train", images.train), ("test", images.test))
        )
        for measure in also:
            measure(model, encoder)
        del encoder
        for feature in train:
            data = train[feature], train_labels, test[feature]
            predicted: dict[str, tuple[npt.NDArray[np.int64], float | None]]
            predicted = {"knn": (knn(*data, k=k), None)}
            if linear:
                predicted["linear"] = linear_probe(*data)
            for probe, (labels, strength) in predicted.items():
                is_right = labels == test_labels
                of_first = first.get((probe, feature))
                scores.append(
                    ProbeScore(
                        model,
                        probe,
                        feature,
                        float(is_right.mean()),
                        bootstrap_interval(is_right.astype(np.float64)),
                        *_compared(is_right, of_first),
                        C=strength,
                    )
                )
                if at == 0:
                    first[probe, feature] = is_right
    return scores


def _compared(
    is_right: npt.NDArray[np.bool_], of_first: npt.NDArray[np.bool_] | None
) -> tuple[float | None, Interval | None, float | None]:
    if of_first is None:
        return None, None, None
    difference_N = is_right.astype(np.float64) - of_first
    p = mcnemar_p(int((difference_N > 0).sum()), int((difference_N < 0).sum()))
    return float(difference_N.mean()), bootstrap_interval(difference_N), p
