"""What the codecs of few bits lose of real encoders' features; skipped where no weights are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from movekd.cache.codecs import codec
from movekd.cache.spec import load_spec
from movekd.cache.stats import StatsAccumulator
from movekd.teachers import load_teacher

TEACHERS = Path(__file__).parents[3] / "pipelines" / "photos" / "teachers"
MEAN_ERROR = {"lloyd4": 0.10, "lloyd3": 0.19, "lloyd2": 0.35}


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", pytest.param("vit_s", marks=pytest.mark.slow)]
)
def test_the_error_is_that_of_normal_values(
    name: str, real_weights: Callable[[str], Path], photographs: Path
) -> None:
    """Whatever the tails: int4 loses 8% of the ViT and 16% of the network with outliers."""
    spec = load_spec(str(TEACHERS / f"{name}.yaml"))
    teacher = load_teacher(spec.with_changes(weights=str(real_weights(name))))
    output = teacher.forward(pixels(photographs, spec.image_size, spec.mean, spec.std))
    features_BND = output.tokens_BND.clone()
    accumulator = StatsAccumulator()
    accumulator.add(features_BND[::2])
    for few_bits, limit in MEAN_ERROR.items():
        stats = accumulator.result(0.25).for_codec(codec(few_bits))
        exact_BND = features_BND[1::2]
        errors = codec(few_bits).error(exact_BND, codec(few_bits).encode(exact_BND, stats), stats)
        assert 0.8 * limit < errors.sum.item() / exact_BND[..., 0].numel() <= limit


def pixels(photographs: Path, size: int, mean: tuple, std: tuple) -> torch.Tensor:
    """Return all photographs and crops as a teacher sees them, (6, 3, size, size)."""
    images = [
        np.asarray(Image.open(file).convert("RGB").resize((size, size)), np.float32) / 255
        for file in sorted(photographs.glob("*.png"))
    ]
    normalised = (np.stack(images) - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()
