"""Real photographs without a download: those that installed packages carry, cut into many."""

import hashlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import skimage
from PIL import Image
from sklearn.datasets import load_sample_images

from movekd.corpus.index import Corpus

SKIMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


def photographs() -> list[Image.Image]:
    """Return ten colour photographs, 451 x 300 to 1,411 x 1,411 pixels."""
    paths = [Path(skimage.__file__).parent / "data" / name for name in SKIMAGE]
    paths.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    found = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return found + [Image.open(path).convert("RGB") for path in paths]


def write_jpegs(folder: Path, count: int, size: tuple[int, int] = (640, 480)) -> None:
    """Write ``count`` distinct crops of the photographs as JPEG files of one size, quality 90."""
    folder.mkdir(parents=True)
    photos, draw = photographs(), np.random.default_rng(0)
    for number in range(count):
        photo = photos[number % len(photos)]
        box = _crop(draw, photo.size, size[0] / size[1])
        crop = photo.resize(size, Image.Resampling.BICUBIC, box=tuple(box))
        crop.save(folder / f"{number:05d}.jpg", quality=90)


def sha256_seconds(corpus: Corpus, images: Sequence[int], repeats: int = 11) -> float:
    """Return the median time that the SHA-256 of some images of a corpus takes, in one thread."""
    contents, seconds = [corpus.read_image(image) for image in images], []
    for _ in range(repeats):
        started = time.perf_counter()
        for content in contents:
            hashlib.sha256(content).digest()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _crop(
    draw: np.random.Generator, size: tuple[int, int], ratio: float
) -> npt.NDArray[np.float64]:
    """Return left, top, right, bottom of a box with sides of this ratio, half to all of a photo."""
    width, height = size
    largest = min(width, height * ratio)
    side = draw.uniform(0.5, 1) * largest
    left, top = draw.uniform(0, width - side), draw.uniform(0, height - side / ratio)
    return np.array([left, top, left + side, top + side / ratio])
