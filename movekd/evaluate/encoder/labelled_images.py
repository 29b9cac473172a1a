"""Read labelled images for a probe: a folder ``train|test/CLASS/FILE``, or a list of files.

Input: a folder, or a CSV file (see ``image_list``). Output: the images of each split with the
SHA-256 of their bytes. Images that cannot be decoded are left out and reported, so found = used +
reasons.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from movekd.corpus.decode import decode_image
from movekd.corpus.folder import list_folder, require_folder
from movekd.errors import CorpusError, MovekdError, shorten
from movekd.evaluate.encoder.image_list import SPLITS, list_images
from movekd.evaluate.image_folder import Progress, read_from_folder


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
        source: the folder or the list, for messages.
    """

    train: list[LabelledImage]
    test: list[LabelledImage]
    classes: list[str]
    num_found: int
    skipped: dict[str, str]
    read: Callable[[str], bytes]
    source: Path

    def without(self, reasons: Mapping[str, str]) -> "LabelledImages":
        """Return the images without some of them: SHA-256 -> why it is not used.

        Raises:
            CorpusError: too few are left.
        """
        if not reasons:
            return self
        used = (*self.train, *self.test)
        left_out = {i.name: reasons[i.sha256] for i in used if i.sha256 in reasons}
        train, test = (
            [image for image in split if image.sha256 not in reasons]
            for split in (self.train, self.test)
        )
        skipped = left_out | self.skipped
        _require_usable(self.source, train, test, self.classes, skipped)
        return replace(self, train=train, test=test, skipped=skipped)


def read_labelled_images(source: Path, progress: Progress) -> LabelledImages:
    """Return the images of a folder ``train|test/CLASS/FILE``, or of a CSV file that lists them.

    Raises:
        CorpusError: the folder or the list lacks a split, a class of test is not in train, or a
            class has fewer than two images to learn from.
    """
    if source.is_file():
        folder = source.parent
        listed, skipped, num_found = list_images(source)
        where = f"{source} has the label {{}} in test, but not in train"
    else:
        folder = source
        listed, skipped, num_found = _list_folder(source)
        where = f"{source} has test/{{}}, but no train/{{}}"
    classes = sorted({label for split, label in listed.values() if split == "train"})
    index = {label: at for at, label in enumerate(classes)}
    unreadable: dict[str, str] = {}
    read, images = read_from_folder(folder), {split: list[LabelledImage]() for split in SPLITS}
    for done, (name, (split, label)) in enumerate(listed.items(), start=1):
        if label not in index:
            raise CorpusError(
                f"{where.replace('{}', shorten(label))}; expected the same classes in both. Add it "
                "to train, or take it out of test."
            )
        try:
            decode_image(content := read(name))
        except MovekdError as error:
            unreadable[name] = str(error)
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        images[split].append(LabelledImage(name, index[label], sha256))
        progress("check images", done, len(listed))
    train, test, skipped = images["train"], images["test"], unreadable | skipped
    _require_usable(source, train, test, classes, skipped)
    return LabelledImages(train, test, classes, num_found, skipped, read, source)


def _list_folder(folder: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str], int]:
    """Return name -> (split, class), name -> why it is not used, and how many were found."""
    require_folder(folder)
    found = list_folder(folder)
    skipped, listed = dict(found.skipped), dict[str, tuple[str, str]]()
    for name in found.files:
        parts = name.split("/")
        if len(parts) < 3 or parts[0] not in SPLITS:
            skipped[name] = "it lies in no folder train/CLASS or test/CLASS"
        else:
            listed[name] = (parts[0], parts[1])
    return listed, skipped, len(found.files) + len(found.skipped)


def _require_usable(
    source: Path,
    train: list[LabelledImage],
    test: list[LabelledImage],
    classes: list[str],
    skipped: Mapping[str, str],
) -> None:
    """Raise CorpusError if too few images are left."""
    reason = ""
    if skipped:
        name, why = next(iter(skipped.items()))
        reason = f" {len(skipped)} are not used, the first is {shorten(name, 80)}: {shorten(why)}"
    for split, images in zip(SPLITS, (train, test), strict=True):
        if not images:
            raise CorpusError(
                f"{source} holds no image of {split} that can be used; expected train/CLASS/ and "
                "test/CLASS/ with an image in each, or a CSV file that lists images of both."
                f"{reason}"
            )
    counts = [sum(image.label == at for image in train) for at in range(len(classes))]
    if len(classes) < 2 or min(counts) < 2:
        raise CorpusError(
            f"{source} has {len(classes)} classes in train, the smallest of {min(counts)} usable "
            f"images; expected two or more classes of two or more images. Add images.{reason}"
        )
