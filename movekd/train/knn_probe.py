"""Measure the encoder during training by kNN on labelled images: `data.probe_images`.

Input: the model as it is in a step, and a folder with ``train/CLASS/`` and ``test/CLASS/``. Output:

    eval_knn_cls_accuracy       by the [CLS] token, if the tower has one
    eval_knn_patches_accuracy   by the mean of the patches

Features and votes are those of `movekd probe`, which finds the same of the saved model. The ranks
share the images. Nothing learns and no random number is drawn: the weights are those of a run
without it.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import TrainingArguments

from movekd.distributed import gather
from movekd.errors import ConfigError
from movekd.evaluate.encoder.classify import NUM_NEIGHBOURS, knn
from movekd.evaluate.encoder.encoders import Encoder
from movekd.evaluate.encoder.features import BLOCK_IMAGES, Features, encode_images
from movekd.evaluate.encoder.labelled_images import (
    LabelledImage,
    LabelledImages,
    read_labelled_images,
)
from movekd.evaluate.image_folder import Progress, list_problems
from movekd.student.vlm import Student
from movekd.train.data_keys import DataConfig
from movekd.train.evaluation import measuring
from movekd.train.fsdp import is_fsdp_asked_for


@dataclass(frozen=True)
class ProbeImages:
    """The images of `data.probe_images`.

    Attributes:
        folder: where they lie.
        images: those that can be read, and why others cannot.
    """

    folder: Path
    images: LabelledImages

    def fingerprint(self) -> str:
        """Return a checksum of the images' bytes, classes and splits; names may differ."""
        lines = "".join(
            f"{split} {image.sha256} {self.images.classes[image.label]}\n"
            for split, images in (("train", self.images.train), ("test", self.images.test))
            for image in images
        )
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()

    def describe(self) -> str:
        """Return what the probe measures on, as one line."""
        found, skipped = self.images.num_found, self.images.skipped
        said = (
            f"data.probe_images: kNN on {len(self.images.test):,} images of "
            f"{len(self.images.classes):,} classes, by {len(self.images.train):,} labelled ones"
        )
        if skipped:
            problems = list_problems(skipped)
            said += f"; {len(skipped):,} of {found:,} files are not used: {problems.rstrip('.')}"
        return f"{said}."


def read_probe_images(
    data: DataConfig, arguments: TrainingArguments, progress: Progress | None
) -> ProbeImages | None:
    """Return the images of `data.probe_images`, all of them decoded once; None without the key.

    Raises:
        ConfigError: the run shards the encoder, or too few images to learn from.
        CorpusError: the folder is not laid out as train/CLASS and test/CLASS.
    """
    if data.probe_images is None:
        return None
    sharded = "FSDP" if is_fsdp_asked_for(arguments) else "DeepSpeed" if arguments.deepspeed else ""
    if sharded:
        raise ConfigError(
            f"data.probe_images asks for kNN during the run, which {sharded} shards; expected a "
            "run whose ranks hold the whole encoder. Leave it out, and run `movekd probe` on the "
            "result."
        )
    shown = progress if progress is not None and arguments.process_index == 0 else _quiet
    images = read_labelled_images(data.probe_images, shown)
    if len(images.train) < NUM_NEIGHBOURS:
        raise ConfigError(
            f"data.probe_images is {data.probe_images}, whose train part holds {len(images.train)} "
            f"images that can be read; expected {NUM_NEIGHBOURS} or more, as kNN looks at "
            f"so many neighbours. Add images."
        )
    return ProbeImages(data.probe_images, images)


@dataclass(frozen=True)
class KnnProbe:
    """kNN on the features of a model that trains.

    Args:
        images: what to classify.
        encoder: the model's own tower, not a copy.
    """

    images: LabelledImages
    encoder: Encoder

    @classmethod
    def of(
        cls, images: ProbeImages | None, student: Student, data: DataConfig
    ) -> "KnnProbe | None":
        """Return the probe of a run, or None if it has no images for it."""
        if images is None:
            return None
        assert data.geometry is not None
        layer = int(student.vlm.config.vision_feature_layer)
        return cls(images.images, Encoder(student, data.geometry, layer, identity="in training"))

    def measure(self, arguments: TrainingArguments) -> dict[str, float]:
        """Return the accuracy by each feature, and the seconds; every rank must call this."""
        began = time.time()
        with measuring(self.encoder.student.vlm, arguments.device):
            train, test = (
                self._encode(split, arguments.process_index, arguments.world_size)
                for split in (self.images.train, self.images.test)
            )
        train_labels, test_labels = (
            np.array([image.label for image in split], np.int64)
            for split in (self.images.train, self.images.test)
        )
        figures = {
            f"eval_knn_{name}_accuracy": float(
                (knn(train[name], train_labels, test[name]) == test_labels).mean()
            )
            for name in train
        }
        return figures | {"eval_knn_runtime": round(time.time() - began, 4)}

    def _encode(self, images: list[LabelledImage], rank: int, num_ranks: int) -> Features:
        """Return the features of all images, of which each rank computes a share."""
        positions = share_positions(len(images), rank, num_ranks)
        found: Features = {}
        if len(positions):
            mine = [images[position] for position in positions]
            found = encode_images(self.encoder, mine, self.images.read, None, _quiet)
        return join_shares(gather((positions, found)))


def share_positions(num_images: int, rank: int, num_ranks: int) -> npt.NDArray[np.int64]:
    """Return the positions of a rank's images: whole blocks, by turns.

    A block is a batch, so features do not depend on the number of ranks.
    """
    positions: npt.NDArray[np.int64] = np.arange(num_images)
    mine: npt.NDArray[np.int64] = positions[positions // BLOCK_IMAGES % num_ranks == rank]
    return mine


def join_shares(shares: Sequence[tuple[npt.NDArray[np.int64], Features]]) -> Features:
    """Return the features of all images, in order, from the positions and features of each rank."""
    order = np.argsort(np.concatenate([positions for positions, _ in shares]))
    return {
        name: np.concatenate([found[name] for _, found in shares if found])[order]
        for name in shares[0][1]  # the first rank has the first block
    }


def _quiet(what: str, done: int, total: int) -> None:
    """Show no progress: an evaluation has no bar."""
