"""Classify test images by the features of train images: weighted kNN, and a linear probe.

Input: features (images, D) and labels. Output: the predicted label of each test image.

Legend: M train images, N test images, D channels, K classes.
"""

import numpy as np
import numpy.typing as npt
import torch

from movekd.errors import ConfigError

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's ``C``, the inverse of the regularisation, on standardised features."""
_CHUNK = 1024


def knn(
    train_MD: Array,
    labels_M: Labels,
    test_ND: Array,
    *,
    k: int = NUM_NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Labels:
    """Return the class with the largest sum of ``exp(cosine / temperature)`` over k neighbours.

    Raises:
        ConfigError: k is larger than the number of train images.

    Source: Wu et al. (arXiv 1805.01978), as in facebookresearch/dino eval_knn.py.
    """
    require_neighbours(k, len(train_MD))
    normed_MD = torch.nn.functional.normalize(torch.from_numpy(train_MD), dim=1)
    labels, num_classes = torch.from_numpy(labels_M), int(labels_M.max()) + 1
    found = []
    for chunk_ND in torch.split(torch.from_numpy(test_ND), _CHUNK):
        cosine_NM = torch.nn.functional.normalize(chunk_ND, dim=1) @ normed_MD.T
        top_NK, at_NK = cosine_NM.topk(k, dim=1)
        votes = torch.zeros(len(chunk_ND), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[at_NK], (top_NK.double() / temperature).exp())
        found.append(votes.argmax(1))
    return torch.cat(found).numpy()


def require_neighbours(k: int, num_train: int) -> None:
    """Refuse more neighbours than train images.

    Raises:
        ConfigError: names both.
    """
    if not 1 <= k <= num_train:
        raise ConfigError(
            f"--k is {k}, but train holds {num_train} images; expected 1 to {num_train}."
        )


def linear_probe(train_MD: Array, labels_M: Labels, test_ND: Array) -> tuple[Labels, float]:
    """Return the predictions of a logistic regression, and its ``C``.

    ``C`` is the best of ``STRENGTHS`` on every fifth image of each class of train (the smaller one
    where two are equal); the probe then learns from all of train.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    require_sklearn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    def fit(images_MD: Array, labels: Labels, strength: float) -> tuple[object, object]:
        scaler = StandardScaler().fit(images_MD)
        model = LogisticRegression(C=strength, max_iter=5000)
        return scaler, model.fit(scaler.transform(images_MD), labels)

    def predict(fitted: tuple[object, object], images_MD: Array) -> Labels:
        scaler, model = fitted
        predicted: Labels = model.predict(scaler.transform(images_MD))  # type: ignore[attr-defined]
        return predicted

    is_held_out = _every_fifth(labels_M)
    scores = [
        (
            predict(fit(train_MD[~is_held_out], labels_M[~is_held_out], c), train_MD[is_held_out])
            == labels_M[is_held_out]
        ).mean()
        for c in STRENGTHS
    ]
    strength = STRENGTHS[int(np.argmax(scores))]
    return predict(fit(train_MD, labels_M, strength), test_ND), strength


def require_sklearn() -> None:
    """Raise ConfigError if scikit-learn is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the linear probe needs scikit-learn, which is not installed; run "
            "`pip install 'movekd[probe]'`, or give --no-linear."
        ) from None


def _every_fifth(labels_M: Labels) -> npt.NDArray[np.bool_]:
    """Return which images are held out: of each class the second, the seventh and so on."""
    chosen = np.zeros(len(labels_M), bool)
    for label in np.unique(labels_M):
        chosen[np.flatnonzero(labels_M == label)[1::5]] = True
    return chosen
