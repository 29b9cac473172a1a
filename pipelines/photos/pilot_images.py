"""Divide CIFAR-10's folders into images to distil on, a validation and a test folder.

Input: ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, all 5,000 and 1,000 per class or a part of
them. Of all, ``draw`` takes the part that the committed rows are about. Output, as copies:

    source/CLASS/          what the student distils on; labels are not used
    val/train, val/test    folders of `movekd probe`, both out of train; settings are chosen here
    test/train, test/test  the same, with the images of test; read once, at the end

``val/train`` and ``test/train`` are the same part of ``source``. ``val/test`` is no part of it.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from movekd.errors import ConfigError, shorten


@dataclass(frozen=True)
class Sizes:
    """Images per class, the first ones in the order of names.

    Attributes:
        distilled: images of train to distil on.
        labelled: how many of those teach a probe.
        val: images of train after the distilled ones.
        test: images of test.
    """

    distilled: int = 400
    labelled: int = 150
    val: int = 100
    test: int = 60


WHOLE = {"train": 5000, "test": 1000}
"""Images per class of CIFAR-10."""
DRAWN = {"train": 1000, "test": 200}


def draw(classes: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Return the names of the images that stand for all: split and class -> names, in order."""
    numbers = random.Random(0)
    return {
        (split, name): [
            f"{number:04d}.jpg" for number in sorted(numbers.sample(range(WHOLE[split]), count))
        ]
        for split, count in DRAWN.items()
        for name in classes
    }


def divide(images: Path, output: Path, sizes: Sizes) -> None:
    """Copy the images; what exists is written again.

    Raises:
        ConfigError: a folder is missing, or a class has too few images.
    """
    kept = sizes.distilled + sizes.val
    trains = class_files(images, "train", kept)
    tests = class_files(images, "test", sizes.test)
    if trains.keys() != tests.keys():
        raise ConfigError(
            f"{images}/train and {images}/test have other classes; expected the same folders in "
            "both. Unpack the images again."
        )
    for name, train in trains.items():
        parts = {
            "source": train[: sizes.distilled],
            "val/train": train[: sizes.labelled],
            "val/test": train[sizes.distilled : kept],
            "test/train": train[: sizes.labelled],
            "test/test": tests[name][: sizes.test],
        }
        for part, files in parts.items():
            (output / part / name).mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(file, output / part / name / file.name)


def class_files(images: Path, split: str, count: int) -> dict[str, list[Path]]:
    """Return the images of each class, ``count`` or more; of the whole data set those of ``draw``.

    Raises:
        ConfigError: the folder is missing, or a class has too few images.
    """
    classes = _classes(images, split)
    drawn = draw(classes)
    return {
        name: _files(images / split / name, count, drawn[split, name], WHOLE[split])
        for name in classes
    }


def _classes(images: Path, split: str) -> list[str]:
    folder = images / split
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} does not exist; expected train/CLASS and test/CLASS of CIFAR-10. "
            "docs/photos.md says where the images are."
        )
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _files(folder: Path, count: int, drawn: Sequence[str], whole: int) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    if len(files) < count:
        raise ConfigError(
            f"{shorten(str(folder), 200)} has {len(files)} images; expected {count} or more. "
            "Unpack the images again, or ask for fewer."
        )
    return [folder / name for name in drawn] if len(files) == whole else files
