"""Real weights for the tests, or the reason why they are skipped.

MOVEKD_PHOTOS_WEIGHTS names a folder that keeps them between runs; default: demo-real/weights.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from movekd.errors import WeightsError

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def real_weights() -> Callable[[str], Path]:
    """Return a function from a model's name to its converted folder."""
    weights = pytest.importorskip("weights")
    default = REPOSITORY / "demo-real/weights"
    output = Path(os.environ.get("MOVEKD_PHOTOS_WEIGHTS") or default)

    def make(name: str) -> Path:
        output.mkdir(parents=True, exist_ok=True)
        try:
            folder: Path = weights.make_weights(output, [name])[name]
        except (WeightsError, ImportError) as error:
            pytest.skip(str(error))
        return folder

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four photographs that scikit-image's wheel holds, and crops of two of them."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / f"{name}.png")
    for name in ("chelsea", "coffee"):
        picture = Image.open(folder / f"{name}.png")
        width, height = picture.size
        box = (width // 8, 0, width, height * 7 // 8)
        picture.crop(box).save(folder / f"{name}_crop.png")
    return folder
