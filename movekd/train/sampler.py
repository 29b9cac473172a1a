"""The order of samples: `(seed, epoch)` fixes one global order, and the processes slice it.

A sampler yields positions in the data set. Which samples make up a step depends on nothing but the
seed, the epoch and the samples per step, so a run can resume with another number of processes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

EMPTY = -1
"""Position of a sample that holds nothing."""
Order = npt.NDArray[np.int64]


class GlobalOrderSampler(Sampler[int]):
    """Every sample once per epoch, shuffled, and ``EMPTY`` until all processes have full batches.

    accelerate would fill up with samples that were seen already, and some would count twice.

    Args:
        num_samples: length of the data set.
        seed: of the order, together with the epoch.
        global_batch_size: samples per optimizer step, over all processes.
        lengths: words per sample, negative for text-only ones. The samples of a step are then of
            one modality. None shuffles plainly.
        micro_batch_size: samples that one process takes at once. With ``lengths``, the
            micro-batches of a step hold about as many words each. Default: the whole step.
        multiple_of: samples of a micro-batch over all processes.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        global_batch_size: int = 1,
        lengths: Sequence[int] | None = None,
        micro_batch_size: int | None = None,
        multiple_of: int = 1,
    ) -> None:
        self._num_missing = -num_samples % multiple_of
        self._num_samples, self._seed, self._epoch = num_samples, seed, 0
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size or global_batch_size
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
            order = modality_length_order(
                self._lengths, self._global_batch_size, self._micro_batch_size, random
            )
        return iter(order.tolist() + [EMPTY] * self._num_missing)


def modality_length_order(
    lengths: Order, batch_size: int, micro_batch_size: int, random: np.random.Generator
) -> Order:
    """Return the order in which LLaVA trains: one modality per step, equal work per micro-batch.

    The samples of a step are drawn at random from one modality. Length only decides which
    micro-batch of the step a sample goes to, so a step keeps the mixture of tasks and of lengths.
    The last draw of each modality comes at the end, in the order of the data set; up to two steps
    are therefore mixed.

    Args:
        lengths: words per sample, not 0; negative for text-only samples.
        batch_size: samples per optimizer step.
        micro_batch_size: samples that one process takes at once; divides ``batch_size``.
        random: draws three permutations, or one where all samples are of one modality: of the
            samples with images, of those without, and of the steps.

    Source: haotian-liu/LLaVA llava/train/llava_trainer.py, get_modality_length_grouped_indices,
    with its world_size times gradient_accumulation_steps as micro-batches per step.
    """
    steps: list[Order] = []
    last: list[Order] = []
    for chosen in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        shuffled = random.permutation(chosen) if len(chosen) else chosen
        drawn = [shuffled[at : at + batch_size] for at in range(0, len(shuffled), batch_size)]
        drawn = [_balance(step, np.abs(lengths), micro_batch_size, batch_size) for step in drawn]
        steps += drawn[:-1]
        last += drawn[-1:]
    if len(last) < 2:  # one modality: its steps are in random order already
        return np.concatenate([*steps, *last]) if last else np.empty(0, np.int64)
    order = [steps[at] for at in random.permutation(len(steps))]
    return np.concatenate([*order, np.sort(np.concatenate(last))])


def _balance(step: Order, lengths: Order, micro_batch_size: int, batch_size: int) -> Order:
    """Return the samples of a step, so divided into micro-batches that each has as many words.

    From the longest sample to the shortest, each goes to the micro-batch with the fewest words that
    still has room. What cannot be divided evenly is dealt out in turn instead.
    """
    num_parts = batch_size // micro_batch_size
    descending = step[np.argsort(-lengths[step], kind="stable")]
    room, rest = divmod(len(step), num_parts)
    if rest:
        return np.concatenate([descending[part::num_parts] for part in range(num_parts)])
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    words = [0] * num_parts
    for position in descending.tolist():
        open_parts = [part for part in range(num_parts) if len(parts[part]) < room]
        fewest = min(open_parts, key=words.__getitem__)
        parts[fewest].append(position)
        words[fewest] += int(lengths[position])
    return np.array([position for part in parts for position in part], np.int64)
