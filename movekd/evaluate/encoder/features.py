"""Compute the features of images, or read those that an earlier probe kept.

Input: a model, images, a folder. Output: one array per feature, (images, D) float32. The folder
holds a file for each block of images, whole or not at all: an interrupted probe continues behind
its last block. The name of a file is a hash of the model and of the images' bytes.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from movekd.errors import ConfigError, shorten
from movekd.evaluate.encoder.labelled_images import LabelledImage
from movekd.evaluate.encoder.probed_model import ProbedModel, pooled
from movekd.evaluate.image_folder import Progress
from movekd.files.ownership import write_durably
from movekd.files.reading import MIB, read_bytes

BLOCK_IMAGES = 64
"""Images of a block, which is also a batch: features do not depend on what was kept before."""
_SEAL_BYTES = 16
_MAX_BLOCK_BYTES = 4096 * MIB
"""64 images of 4,096 tokens of 3,072 channels have 3 GiB."""
_SUFFIX = ".features"
_OURS = re.compile(rf"\.?[0-9a-f]{{64}}\{_SUFFIX}(\.\d+\.tmp)?")
"""Names that a probe writes: kept blocks, and what it was writing when it was killed."""

Features = dict[str, npt.NDArray[np.float32]]


def encode_images(
    encoder: ProbedModel,
    images: Sequence[LabelledImage],
    read: Callable[[str], bytes],
    folder: Path | None,
    progress: Progress,
    label: str = "encode",
) -> Features:
    """Return ``cls`` and ``patches`` of images, in order.

    Raises:
        ConfigError: a kept file is damaged, or the folder cannot be written.
    """
    blocks: list[dict[str, Tensor]] = []
    for start in range(0, len(images), BLOCK_IMAGES):
        block = images[start : start + BLOCK_IMAGES]
        path = None
        if folder is not None and encoder.identity is not None:
            path = block_file(folder, encoder.identity, [image.sha256 for image in block])
        if path is not None and path.exists():
            blocks.append(read_block(path))
        else:
            contents = (read(image.name) for image in block)
            blocks.append(pooled(encoder.encode([image.sha256 for image in block], contents)))
            if path is not None:
                write_block(path, blocks[-1])
        progress(label, start + len(block), len(images))
    names = sorted(blocks[0])  # those of a kept block may have another order
    return {name: torch.cat([block[name] for block in blocks]).numpy() for name in names}


def require_features_folder(folder: Path) -> None:
    """Create the folder that keeps features, and try it before any model is loaded.

    Raises:
        ConfigError: nothing can be written there, or it holds files of somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(
            f"--features {folder} cannot be used: {error.strerror}; expected a folder that can be "
            "written. Give another one."
        ) from None
    if foreign := [name for name in names if not _OURS.fullmatch(name)]:
        raise ConfigError(
            f"--features {folder} holds {shorten(foreign[0])}"
            f"{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}, which no probe wrote; "
            "expected an empty folder or one of an earlier probe. Give another one."
        )


def block_file(folder: Path, identity: str, keys: Sequence[str]) -> Path:
    """Return the file of a batch: a hash of what decides a feature and of the images' keys."""
    text = " ".join([identity, *keys])
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()}{_SUFFIX}"


def write_block(path: Path, features: dict[str, Tensor]) -> None:
    """Write a batch's features with their checksum, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written.
    """
    content = save(features)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, xxhash.xxh3_128_digest(content) + content)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; expected a folder with room in it. Give "
            "another one with --features."
        ) from None


def read_block(path: Path) -> dict[str, Tensor]:
    """Return a batch's features.

    Raises:
        ConfigError: the file is damaged.
    """
    raw = read_bytes(path, max_bytes=_MAX_BLOCK_BYTES)
    seal, content = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:]
    try:
        if xxhash.xxh3_128_digest(content) == seal:
            return dict(load(content))
    except SafetensorError:
        pass
    raise ConfigError(
        f"{path} is damaged: its bytes are not those of its checksum. Delete it; the next probe "
        "computes it again."
    )
