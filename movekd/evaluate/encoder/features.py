"""Compute the features of images, or read those that an earlier probe kept.

Input: an encoder, images, a folder. Output: one array per feature, (images, D) float32. The folder
holds a file for each block of images, whole or not at all: an interrupted probe continues behind
its last block. The name of a file is a hash of the encoder and of the images' bytes.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from movekd.errors import ConfigError
from movekd.evaluate.encoder.encoders import Encoder
from movekd.evaluate.encoder.labelled_images import LabelledImage
from movekd.evaluate.image_folder import Progress
from movekd.files.ownership import write_durably
from movekd.files.reading import MIB, read_bytes

BLOCK_IMAGES = 64
"""Images of a block, which is also a batch: features do not depend on what was kept before."""
_SEAL_BYTES = 16

Features = dict[str, npt.NDArray[np.float32]]


def encode_images(
    encoder: Encoder,
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
    transform = encoder.student.image_transform(encoder.geometry)
    for start in range(0, len(images), BLOCK_IMAGES):
        block = images[start : start + BLOCK_IMAGES]
        path = None if folder is None else folder / f"{_name(encoder, block)}.features"
        if path is not None and path.exists():
            blocks.append(_read(path))
        else:
            pixels = np.stack([transform(read(image.name)) for image in block])
            blocks.append(encoder.features(torch.from_numpy(pixels)))
            if path is not None:
                _write(path, blocks[-1])
        progress(label, start + len(block), len(images))
    return {name: torch.cat([block[name] for block in blocks]).numpy() for name in blocks[0]}


def _name(encoder: Encoder, block: Sequence[LabelledImage]) -> str:
    text = " ".join([encoder.identity, *(image.sha256 for image in block)])
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, features: dict[str, Tensor]) -> None:
    content = save(features)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, xxhash.xxh3_128_digest(content) + content)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; expected a folder with room in it. Give "
            "another one with --features."
        ) from None


def _read(path: Path) -> dict[str, Tensor]:
    raw = read_bytes(path, max_bytes=256 * MIB)
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
