"""Order the samples of an epoch: seed and epoch fix one global order, which the ranks slice.

A sampler yields positions in the data set. The samples of a step depend only on the seed, the epoch
and the samples per step, so a run can resume with another number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

EMPTY = -1
"""Position of an empty sample, which fills a batch."""
Order = npt.NDArray[np.int64]


class GlobalOrderSampler(Sampler[int]):
    """Yield every sample that an epoch takes, shuffled, then ``EMPTY`` until all batches are full.

    Without it accelerate repeats samples to fill the last batches, and some count twice.

    Args:
        num_samples: length of the data set.
        seed: of the order, together with the epoch.
        global_batch_size: samples per optimizer step, over all processes.
        lengths: words per sample, negative for text-only ones. The samples of a step then have
            one modality. None: a plain shuffle.
        micro_batch_size: samples per rank and forward pass. With ``lengths``, the micro-batches
            of a step hold about equally many words. Default: the whole step.
        multiple_of: samples of a micro-batch over all ranks.
        row_lengths: tokens of packed rows. The rows of a step are then ordered from the longest to
            the shortest, so that a micro-batch has little padding. A step keeps its rows.
        draw: seed, epoch -> the samples that an epoch takes; always as many. Default: each once.
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
        row_lengths: Order | None = None,
        draw: Callable[[int, int], Order] | None = None,
    ) -> None:
        self._draw = draw or (lambda seed, epoch: np.arange(num_samples))
        self._seed, self._epoch = seed, 0
        self._num_drawn = num_samples if draw is None else len(draw(seed, 0))
        self._num_missing = -self._num_drawn % multiple_of
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size or global_batch_size
        self._lengths = None if lengths is None else np.asarray(lengths, np.int64)
        self._row_lengths = row_lengths

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_drawn + self._num_missing

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        drawn = self._draw(self._seed, self._epoch)
        if self._lengths is None:
            order = random.permutation(len(drawn))
            if self._row_lengths is not None:
                lengths = self._row_lengths[drawn]
                order = _longest_first(order, lengths, self._global_batch_size)
        else:
            order = modality_length_order(
                self._lengths[drawn], self._global_batch_size, self._micro_batch_size, random
            )
        return iter(drawn[order].tolist() + [EMPTY] * self._num_missing)


def modality_length_order(
    lengths: Order, batch_size: int, micro_batch_size: int, random: np.random.Generator
) -> Order:
    """Return the order in which LLaVA trains: one modality per step, equal work per micro-batch.

    The samples of a step are drawn at random from one modality. Length only decides which
    micro-batch of the step a sample goes to, so a step keeps the mixture of tasks and of lengths.
    The last draw of each modality is put at the end, in the order of the data set, so up to two
    steps mix modalities.

    Args:
        lengths: words per sample, not 0; negative for text-only samples.
        batch_size: samples per optimizer step.
        micro_batch_size: samples per rank and forward pass; divides ``batch_size``.
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


def _longest_first(order: Order, lengths: Order, batch_size: int) -> Order:
    """Return the order with the rows of each step from the longest to the shortest."""
    steps = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return np.concatenate([step[np.argsort(-lengths[step], kind="stable")] for step in steps])


def _balance(step: Order, lengths: Order, micro_batch_size: int, batch_size: int) -> Order:
    """Return the samples of a step, divided into micro-batches with about equally many words.

    From the longest sample to the shortest, each goes to the micro-batch with the fewest words that
    still has room. If the sizes are uneven, the samples are dealt out in turn instead.
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
