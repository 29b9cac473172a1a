"""R2 and CKA against scikit-learn and a float64 formula.

Legend: I images, N tokens per image, D channels of the student, T of the teacher.
"""

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from movekd.evaluate.encoder.token_fit import Moments, Prediction, linear_cka


def _tokens(seed: int, num_images: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens whose teacher is partly a linear map; one channel is constant, one loud."""
    rng = np.random.default_rng(seed)
    x_IND = rng.normal(size=(num_images, 9, 7)) * [1, 1, 1, 1, 1, 0, 300] + 5
    mixed = x_IND @ np.random.default_rng(9).normal(size=(7, 5)) / [1, 1, 1, 1, 100]
    y_INT = mixed + rng.normal(size=(num_images, 9, 5))
    return torch.from_numpy(x_IND).float(), torch.from_numpy(y_INT).float()


def test_ridge_and_r2_equal_scikit_learn() -> None:
    (x, y), (test_x, test_y) = _tokens(1), _tokens(2)
    flat_x, flat_y = x.flatten(0, 1).double().numpy(), y.flatten(0, 1).double().numpy()
    parts = [Moments.of(some_x, some_y) for some_x, some_y in zip(x, y, strict=True)]
    moments = sum(parts[1:], parts[0])
    for strength in (1e-6, 1e-2, 1.0):
        weights = moments.ridge(strength)
        scaler = StandardScaler().fit(flat_x)
        model = Ridge(alpha=strength * len(flat_x)).fit(scaler.transform(flat_x), flat_y)
        expected = model.predict(scaler.transform(test_x.flatten(0, 1).double().numpy()))
        right = test_y.flatten(0, 1).double().numpy()
        found = Prediction.join(
            [
                Prediction.of(weights, test_x[:5], test_y[:5]),
                Prediction.of(weights, test_x[5:], test_y[5:]),
            ]
        )
        once = torch.ones(1, 12, dtype=torch.float64)
        for channels in (slice(0, 5), slice(0, 2), slice(4, 5)):
            wanted = r2_score(
                right[:, channels], expected[:, channels], multioutput="variance_weighted"
            )
            np.testing.assert_allclose(float(found.r2(once, channels)), wanted, rtol=1e-7)
        error = ((right - expected) ** 2).sum()
        tests = Moments.of(test_x.flatten(0, 1), test_y.flatten(0, 1))
        np.testing.assert_allclose(tests.squared_error(weights), error, rtol=1e-7)


def test_an_image_that_counts_twice_is_there_twice() -> None:
    (x, y), (test_x, test_y) = _tokens(1), _tokens(2)
    weights = Moments.of(x.flatten(0, 1), y.flatten(0, 1)).ridge(1e-4)
    counts = torch.tensor([[2, 0, 3, *[1] * 9]], dtype=torch.float64)
    drawn = torch.repeat_interleave(torch.arange(12), counts[0].long())
    once = torch.ones(1, len(drawn), dtype=torch.float64)
    repeated = Prediction.of(weights, test_x[drawn], test_y[drawn]).r2(once)
    torch.testing.assert_close(Prediction.of(weights, test_x, test_y).r2(counts), repeated)


def test_cka_equals_the_formula() -> None:
    x, y = _tokens(3)
    flat_x, flat_y = (t.flatten(0, 1).double().numpy() for t in (x, y))
    flat_x, flat_y = flat_x - flat_x.mean(0), flat_y - flat_y.mean(0)
    wanted = np.linalg.norm(flat_y.T @ flat_x) ** 2 / (
        np.linalg.norm(flat_x.T @ flat_x) * np.linalg.norm(flat_y.T @ flat_y)
    )
    once = torch.ones(1, 12, dtype=torch.float64)
    np.testing.assert_allclose(linear_cka(x, y, once).numpy(), wanted, rtol=1e-9)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))[0]
    np.testing.assert_allclose(linear_cka(x, 3 * x @ rotation + 1, once).numpy(), 1, rtol=1e-5)


def test_resamples_of_cka_lie_around_its_value() -> None:
    """With copies compared, the middle of these resamples is .044; the value is .023."""
    rng = np.random.default_rng(4)
    x, y = (torch.from_numpy(rng.normal(size=(30, 9, 7))) for _ in range(2))
    counts = torch.from_numpy(rng.multinomial(30, [1 / 30] * 30, 500)).double()
    value = float(linear_cka(x, y, torch.ones(1, 30, dtype=torch.float64)))
    low, high = linear_cka(x, y, counts).quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    assert low < value < high
