"""Read images with label maps for a dense probe: ``train/NAME.EXT`` with ``train/NAME.png``.

Input: a folder of images and a folder of label maps, both with ``train/`` and ``test/``. Output:
the images of each split that have a map, in sorted order. What is not used is counted by a reason,
so found = used + reasons. A map is a PNG of one byte per pixel, grey or with a palette; the byte is
the class, 255 is ignored.

Legend: S side of a square map in pixels.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from movekd.corpus.decode import decode_image
from movekd.corpus.folder import list_folder, require_folder
from movekd.corpus.transforms import Geometry, apply_geometry
from movekd.errors import ConfigError, CorpusError, MovekdError
from movekd.evaluate.encoder.image_list import SPLITS
from movekd.evaluate.image_folder import Progress, read_from_folder

IGNORED = 255
"""The byte of pixels that are neither learned nor scored, as in PASCAL VOC and ADE20K's tools."""
_WHITE = (1.0, 1.0, 1.0)
"""Padding whose byte is ``IGNORED``."""

Map = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MappedImage:
    """One image.

    Attributes:
        name: path below the folder of images.
        map_name: path below the folder of label maps.
        sha256: of the image's file.
    """

    name: str
    map_name: str
    sha256: str


@dataclass(frozen=True)
class MappedImages:
    """The images of a dense probe.

    Attributes:
        train: what the probe learns from.
        test: what it is scored on.
        num_classes: one more than the largest label.
        num_found: images that were found, and label maps without one.
        skipped: name -> why it is not used.
        read: name of an image -> its bytes.
        read_map: name of a map -> its bytes.
        folders: that of the images and that of the maps, for messages.
    """

    train: list[MappedImage]
    test: list[MappedImage]
    num_classes: int
    num_found: int
    skipped: dict[str, str]
    read: Callable[[str], bytes]
    read_map: Callable[[str], bytes]
    folders: tuple[Path, Path]

    def without(self, reasons: Mapping[str, str]) -> "MappedImages":
        """Return the images without some of them: SHA-256 -> why it is not used.

        Raises:
            CorpusError: a split has none left.
        """
        both = (*self.train, *self.test)
        skipped = {i.name: reasons[i.sha256] for i in both if i.sha256 in reasons} | self.skipped
        train, test = (
            [image for image in split if image.sha256 not in reasons]
            for split in (self.train, self.test)
        )
        found = replace(self, train=train, test=test, skipped=skipped)
        found.require_both_splits()
        return found

    def require_both_splits(self) -> None:
        """Refuse images without any to learn from, or without any to score.

        Raises:
            CorpusError: names the split, and a reason why an image is not used.
        """
        images, maps = self.folders
        for split, used in (("train", self.train), ("test", self.test)):
            if not used:
                why = next((f" {name}: {reason}" for name, reason in self.skipped.items()), "")
                raise CorpusError(
                    f"{images}/{split} holds no image that can be used; expected images whose "
                    f"label map is at the same path in {maps}/{split}, such as {split}/NAME.jpg "
                    f"and {split}/NAME.png.{why}"
                )

    def square_map(self, image: MappedImage, side: int, geometry: Geometry) -> Map:
        """Return an image's labels where a model of a geometry sees them: uint8 (S, S)."""
        return square_map(decode_map(self.read_map(image.map_name)), side, geometry)


def read_mapped_images(images: Path, maps: Path, progress: Progress) -> MappedImages:
    """Return the images below two folders, each of them decoded once with its map.

    Raises:
        CorpusError: a folder is missing, a split has no image with a map, or train has one class.
        ConfigError: both are the same folder.
    """
    for folder in (images, maps):
        require_folder(folder)
    if images.samefile(maps):
        raise ConfigError(
            f"--images and --label-maps are both {images}, where a label map cannot be told from "
            "an image; expected two folders. Move the maps."
        )
    found, listed = list_folder(images), list_folder(maps)
    skipped = dict(found.skipped) | {f"{maps.name}/{name}": why for name, why in listed.skipped}
    read, read_map = read_from_folder(images), read_from_folder(maps)
    left, largest, learned = set(listed.files), 0, set[int]()
    used: dict[str, list[MappedImage]] = {split: [] for split in SPLITS}
    for done, name in enumerate(found.files, start=1):
        progress("check images", done, len(found.files))
        map_name = str(PurePosixPath(name).with_suffix(".png"))
        split = name.partition("/")[0]
        if split not in SPLITS:
            skipped[name] = "it lies neither in train/ nor in test/"
            continue
        if map_name not in listed.files:
            skipped[name] = f"it has no label map {map_name}"
            continue
        left.discard(map_name)
        try:
            content = read(name)
            labels = decode_map(read_map(map_name), decode_image(content).size)
        except MovekdError as error:
            skipped[name] = str(error)
            continue
        known = labels[labels != IGNORED]
        if not known.size:
            skipped[name] = f"its label map {map_name} ignores every pixel"
            continue
        largest = max(largest, int(known.max()))
        learned |= set(np.unique(known).tolist() if split == "train" else ())
        sha256 = hashlib.sha256(content).hexdigest()
        used[split].append(MappedImage(name, map_name, sha256))
    skipped |= {f"{maps.name}/{name}": "it is the label map of no image" for name in sorted(left)}
    num_found = sum(map(len, used.values())) + len(skipped)
    result = MappedImages(
        used["train"], used["test"], largest + 1, num_found, skipped, read, read_map, (images, maps)
    )
    result.require_both_splits()
    if len(learned) < 2:
        raise CorpusError(
            f"the label maps in {maps}/train hold only class {min(learned)}; expected two or more "
            "classes. Add images of others."
        )
    return result


def decode_map(content: bytes, size: tuple[int, int] | None = None) -> Map:
    """Return the labels of a PNG, uint8 (height, width).

    Args:
        content: the file.
        size: width and height that are expected.

    Raises:
        CorpusError: it is no PNG of one byte per pixel, or has another size.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        if image.mode not in ("L", "P"):
            raise CorpusError(
                f"its label map is a PNG of mode {image.mode}; expected grey or a palette with one "
                "byte per pixel, which is the class."
            )
        if size is not None and image.size != size:  # before its pixels take memory
            raise CorpusError(
                f"its label map has {image.size[0]} x {image.size[1]} pixels and the image "
                f"{size[0]} x {size[1]}; expected equal sizes."
            )
        labels: Map = np.asarray(image)
    except CorpusError:
        raise
    except Exception as error:  # Pillow's parsers raise anything
        raise CorpusError(f"its label map cannot be decoded: {error}; expected a PNG.") from None
    return labels


def square_map(labels: Map, side: int, geometry: Geometry) -> Map:
    """Return labels as a square of the field that a model sees, by the nearest pixel.

    Padding is ``IGNORED``.
    """
    square = apply_geometry(Image.fromarray(labels), side, geometry, "nearest", _WHITE)
    labels_SS: Map = np.asarray(square)
    return labels_SS if labels_SS.ndim == 2 else labels_SS[..., 0]
