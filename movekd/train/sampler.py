"""The order of samples: `(seed, epoch)` fixes one global order, and the processes slice it.

A sampler yields positions in the data set. Nothing depends on the number of processes or workers,
so a run can be resumed with another number of them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

EMPTY = -1
"""Position of a sample that holds nothing."""
Order = npt.NDArray[np.int64]
_MEGABATCHES = 50
"""Global batches that are sorted by length together; more sort better and shuffle less."""


class GlobalOrderSampler(Sampler[int]):
    """Every sample once an epoch, shuffled, and ``EMPTY`` until all processes have full batches.

    accelerate would fill up with samples that were seen already, and some would count twice.

    Args:
        num_samples: length of the data set.
        seed: of the order, together with the epoch.
        global_batch_size: samples of one optimizer step over all processes.
        lengths: tokens of each sample, negative for text-only ones; None shuffles plainly,
            otherwise batches are of one modality and of like length.
        multiple_of: samples of a micro-batch over all processes.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        global_batch_size: int = 1,
        lengths: Sequence[int] | None = None,
        multiple_of: int = 1,
    ) -> None:
        self._num_missing = -num_samples % multiple_of
        self._num_samples, self._seed, self._epoch = num_samples, seed, 0
        self._global_batch_size = global_batch_size
        self._lengths = None if lengths is None else np.asarray(lengths, np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_samples + self._num_missing

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        if self._lengths is None:
            order = random.permutation(self._num_samples)
        else:
            order = modality_length_order(self._lengths, self._global_batch_size, random)
        return iter(order.tolist() + [EMPTY] * self._num_missing)


def modality_length_order(lengths: Order, batch_size: int, random: np.random.Generator) -> Order:
    """Return an order in which each run of ``batch_size`` is of one modality and like lengths.

    Batches come in random order. What does not fill a batch of its own modality comes last, so
    that at most one batch is mixed.

    Source: the idea of haotian-liu/LLaVA llava/train/llava_trainer.py,
    get_modality_length_grouped_indices.
    """
    batches: list[Order] = []
    rest: list[Order] = []
    for chosen in (np.flatnonzero(lengths >= 0), np.flatnonzero(lengths < 0)):
        shuffled = random.permutation(chosen)
        for start in range(0, len(shuffled), batch_size * _MEGABATCHES):
            mega = shuffled[start : start + batch_size * _MEGABATCHES]
            mega = mega[np.argsort(-np.abs(lengths[mega]), kind="stable")]
            full = len(mega) // batch_size * batch_size
            batches += np.split(mega[:full], range(batch_size, full, batch_size)) if full else []
            rest.append(mega[full:])
    order = [batches[i] for i in random.permutation(len(batches))]
    return np.concatenate([*order, *rest]) if order or rest else np.empty(0, np.int64)
