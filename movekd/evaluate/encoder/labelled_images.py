"""Read labelled images for a probe: ``train/CLASS/FILE`` and ``test/CLASS/FILE`` below a folder.

Input: a folder. Output: the images of each split, in sorted order, with the SHA-256 of their bytes.
Images that cannot be decoded are left out and reported, so found = used + reasons.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from movekd.corpus.decode import decode_image
from movekd.corpus.folder import list_folder, require_folder
from movekd.errors import CorpusError, MovekdError, shorten
from movekd.evaluate.image_folder import Progress, read_from_folder

SPLITS = ("train", "test")


@dataclass(frozen=True)
class LabelledImage:
    """One image.

    Attributes:
        name: path below the folder.
        label: index of its class.
        sha256: of the file's bytes.
    """

    name: str
    label: int
    sha256: str


@dataclass(frozen=True)
class LabelledImages:
    """The images of a probe.

    Attributes:
        train: what the probes learn from.
        test: what they are scored on.
        classes: names of the classes; a label is an index into them.
        num_found: files that were found.
        skipped: name -> why it is not used.
        read: name of an image -> its bytes.
    """

    train: list[LabelledImage]
    test: list[LabelledImage]
    classes: list[str]
    num_found: int
    skipped: dict[str, str]
    read: Callable[[str], bytes]


def read_labelled_images(folder: Path, progress: Progress) -> LabelledImages:
    """Return the images of a folder whose files are ``train|test/CLASS/FILE``.

    Raises:
        CorpusError: the folder lacks a split, a class of test is not in train, or a class has fewer
            than two images to learn from.
    """
    require_folder(folder)
    listed = list_folder(folder)
    skipped, read = dict(listed.skipped), read_from_folder(folder)
    split_of: dict[str, tuple[str, str]] = {}
    for name in listed.files:
        parts = name.split("/")
        if len(parts) < 3 or parts[0] not in SPLITS:
            skipped[name] = "it lies in no folder train/CLASS or test/CLASS"
        else:
            split_of[name] = (parts[0], parts[1])
    classes = sorted({label for split, label in split_of.values() if split == "train"})
    images: dict[str, list[LabelledImage]] = {split: [] for split in SPLITS}
    for done, (name, (split, label)) in enumerate(split_of.items(), start=1):
        if label not in classes:
            raise CorpusError(
                f"{folder} has test/{shorten(label)}, but no train/{shorten(label)}; expected the "
                "same classes in both. Add the folder, or take it out of test."
            )
        try:
            decode_image(content := read(name))
        except MovekdError as error:
            skipped[name] = str(error)
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        images[split].append(LabelledImage(name, classes.index(label), sha256))
        progress("check images", done, len(split_of))
    for split in SPLITS:
        if not images[split]:
            raise CorpusError(
                f"{folder} holds no image in {split}/CLASS/ that can be read; expected one folder "
                "per class in train/ and in test/. Give a folder that is laid out so."
            )
    counts = [sum(image.label == at for image in images["train"]) for at in range(len(classes))]
    if len(classes) < 2 or min(counts) < 2:
        raise CorpusError(
            f"{folder}/train has {len(classes)} classes, the smallest of {min(counts)} readable "
            "images; expected two or more classes of two or more images. Add images."
        )
    return LabelledImages(
        images["train"],
        images["test"],
        classes,
        len(listed.files) + len(listed.skipped),
        skipped,
        read,
    )
