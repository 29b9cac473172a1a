"""Labelled images of two classes, which differ in brightness, for tests of `movekd probe`."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_labelled_folder(root: Path, num_train: int = 40, num_test: int = 10) -> Path:
    """Write ``train|test/dark|light/NNN.png`` of 32 pixels, and a file that is no image."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("test", num_test)):
        for at, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(60 * at, 190 + 60 * at, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:03}.png")
    (root / "train" / "dark" / "notes.jpg").write_text("no image")
    return root
