"""Choose the rank of ``codec: lowrank``: the smallest one that keeps ``max_energy_error``.

Input: features of the calibration, batch by batch, and then the channel statistics. Output: the
name of a codec. ``extract.calibrate`` seals it.

The ranks are tried on some images, in ascending order, with the codec itself: what is compared with
the limit is what the build would seal.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache.codecs import codec
from movekd.cache.codecs.lowrank import LOWRANK, RANKS
from movekd.cache.spec import CacheSpec
from movekd.cache.stats import ChannelStats
from movekd.errors import CacheError
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.run_teacher import LiveFeatures

LIMIT_SHARE = 0.8
"""Share of ``max_energy_error`` that the images of the calibration may use, so that Zarr shards of
other images keep it."""
MAX_IMAGES = 64
MAX_BYTES = 256 * 2**20
"""Memory of the kept tokens, float32; one image may have more."""


class CodecChoice:
    """Tokens of some images of the calibration, if the spec leaves the rank open."""

    def __init__(self, spec: CacheSpec, by_key: npt.NDArray[np.int64]) -> None:
        """Prepare for images at these positions of a corpus; the first ones are kept."""
        self._spec = spec
        self._tokens: list[Tensor] = []
        self._by_key = by_key[: MAX_IMAGES if spec.codec == LOWRANK else 0]
        self._images: set[int] = set()
        self._most = 0

    def keep(self, features: LiveFeatures) -> None:
        """Keep the images of a batch that the ranks are tried on, each with its views."""
        if not len(self._by_key):
            return
        if not self._images:
            self._most = max(1, MAX_BYTES // (4 * features.tokens_BND[0].numel()))
            self._images = set(self._by_key[: self._most].tolist())
        kept = [i for i, image in enumerate(features.images) if image in self._images]
        self._tokens += features.tokens_BND[kept].cpu().unbind()
        del self._tokens[self._most :]  # views of an image are more than one

    def result(self, stats: ChannelStats, options: BuildOptions, progress: Progress) -> str:
        """Return the name of the codec: the spec's, or ``lowrank`` with a rank.

        Raises:
            CacheError: no rank keeps the limit, or none of the images could be read.
        """
        spec, limit = self._spec, self._spec.max_energy_error
        if spec.codec != LOWRANK or limit is None:
            return spec.codec
        if not self._tokens:
            raise CacheError(
                f"teacher '{spec.name}': the {len(self._by_key)} images that ranks are tried on "
                "cannot be read; replace them, or name a rank, such as --codec lowrank32."
            )
        shortest = min(self._tokens[0].shape)
        ranks = [r for below, r in zip((0, *RANKS), RANKS, strict=False) if below < shortest]
        energy = 1.0
        for number, rank in enumerate(ranks):
            progress(f"{spec.name}: rank {rank}", number, len(ranks))
            energy = self._energy_error(f"{LOWRANK}{rank}", stats, options)
            if energy <= LIMIT_SHARE * limit:
                return f"{LOWRANK}{rank}"
        raise CacheError(
            f"teacher '{spec.name}': rank {ranks[-1]} stores its tokens with an energy error of "
            f"{energy:.3%}; expected at most {LIMIT_SHARE:.0%} of max_energy_error {limit:.3%}. "
            "Take a codec of more bytes, such as --codec int8, or raise max_energy_error."
        )

    def _energy_error(self, name: str, stats: ChannelStats, options: BuildOptions) -> float:
        """Return the squared error of all kept tokens over their squared norm."""
        device, tried = torch.device(options.device), codec(name)
        stats = stats.for_codec(tried).to(device)
        squared_error = squared_norm = 0.0
        size = options.forward_batch_size
        for start in range(0, len(self._tokens), size):
            tokens_BND = torch.stack(self._tokens[start : start + size]).to(device)
            errors = tried.error(tokens_BND, tried.encode(tokens_BND, stats), stats)
            squared_error += errors.squared_error.item()
            squared_norm += errors.squared_norm.item()
        return squared_error / max(squared_norm, 1e-30)
