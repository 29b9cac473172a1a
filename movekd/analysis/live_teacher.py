"""Run a teacher on the files of images, prepared as a cache build prepares them.

Input: a spec and the bytes of images. Output: the teacher's features, which nobody stores.
`movekd probe` measures teachers by it: ``evaluate`` may not import teachers, so ``cli`` passes this
on.

Legend: B images, C H W pixels.
"""

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from movekd.cache.spec import CacheSpec
from movekd.corpus.transforms import Geometry
from movekd.extract.image_loader import image_transform
from movekd.extract.options import CPU_BATCH_SIZE
from movekd.teachers import TeacherOutput, load_teacher

_GPU_BATCH_SIZE = 32


class LiveTeacher:
    """A loaded teacher and how images become its pixels. It computes in float32.

    Args:
        spec: the teacher.
        geometry: how images become square, unless the spec says so itself.
        device: where it runs.

    Attributes:
        geometry: how images become square, for this teacher.
        identity: SHA-256 of the weights and of all that decides a feature. Of a network of
            ``provider: python`` it covers the file of the factory, not what that file imports.

    Raises:
        ConfigError: the model, one of its arguments or the layer does not exist.
        WeightsError: the weights are missing, unreadable, or do not fit.
    """

    def __init__(self, spec: CacheSpec, geometry: Geometry, device: str = "cpu") -> None:
        # nobody reads the attention here
        self._teacher = load_teacher(spec.with_changes(cls_attention=False), device)
        self._transform = image_transform(spec, geometry)
        self.geometry = self._transform.geometry
        self._batch_size = CPU_BATCH_SIZE if device == "cpu" else _GPU_BATCH_SIZE
        decides = (self._teacher.weights_sha256, self._teacher.spec.fingerprint, self.geometry)
        self.identity = hashlib.sha256(repr((*decides, _source_sha256(spec))).encode()).hexdigest()

    def encode(self, keys: Sequence[str], contents: Iterable[bytes]) -> TeacherOutput:
        """Return the features of images, float32 on the CPU.

        Args:
            keys: SHA-256 of each image's file; not read.
            contents: the files.

        Raises:
            UnreadableImageError: an image cannot be decoded.
            ConfigError: the model does not take images of its size.
        """
        pixels_BCHW = torch.from_numpy(np.stack([self._transform(data) for data in contents]))
        parts = [
            self._teacher.forward(some).map(lambda tensor: tensor.float().cpu())
            for some in torch.split(pixels_BCHW, self._batch_size)
        ]
        cls = [part.cls_BD for part in parts if part.cls_BD is not None]
        return TeacherOutput(
            torch.cat([part.tokens_BND for part in parts]), torch.cat(cls) if cls else None
        )


def _source_sha256(spec: CacheSpec) -> str:
    """Return the SHA-256 of the file that defines a factory; empty for libraries' models."""
    if spec.factory is None:
        return ""
    module = importlib.import_module(spec.factory.partition(":")[0])  # loaded already
    file = module.__file__  # None: it is built into Python
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
