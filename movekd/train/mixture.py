"""Mix the samples of several sources: one data set, and what an epoch draws from each part.

Input: a data set per source, and its weight. Output: ``Mixture``, whose samples name images and
rows by their numbers over all sources (see ``joined_inputs``), and ``draw``, which the sampler
shuffles. What an epoch draws depends only on seed and epoch, so a resume knows every sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from movekd.train.data import ConversationDataset, Sample
from movekd.train.encoder_data import EncoderDataset, EncoderSample
from movekd.train.packed_data import PackedDataset
from movekd.train.sampler import EMPTY
from movekd.train.sources import Source, describe_shares, num_drawn

Trained = ConversationDataset | PackedDataset | EncoderDataset
"""What one source of a run is read as."""
PartT = TypeVar("PartT", bound=Trained, covariant=True)


@dataclass(frozen=True)
class Part(Generic[PartT]):
    """The samples of one source.

    Attributes:
        source: where they come from.
        dataset: the samples.
    """

    source: Source
    dataset: PartT

    @property
    def num_drawn(self) -> int:
        """Samples per epoch; at least one."""
        return num_drawn(len(self.dataset), self.source.keys.weight)


class Mixture(Dataset[Sample | EncoderSample]):
    """The samples of several sources, one source after the other.

    Args:
        parts: the sources; all packed, or none.
    """

    def __init__(self, parts: Sequence[Part[Trained]]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part.dataset) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> Sample | EncoderSample:
        if position == EMPTY:
            return self.parts[0].dataset[EMPTY]
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        part = self.parts[number]
        sample = part.dataset[position - int(self._starts[number])]
        return sample.shifted(part.source.image_start, part.source.row_start)

    @property
    def num_drawn(self) -> int:
        """Samples per epoch."""
        return sum(part.num_drawn for part in self.parts)

    def draw(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the positions that an epoch takes, (``num_drawn``,), in no particular order.

        A part is a stream of passes over its samples, each in another order; an epoch takes
        the next ``num_drawn`` of it. So at any time each sample of a part was taken as often as
        any other of it, or once more.
        """
        return np.concatenate(
            [
                start + _from_stream(len(part.dataset), part.num_drawn, epoch, (seed, number))
                for number, (start, part) in enumerate(
                    zip(self._starts[:-1], self.parts, strict=True)
                )
            ]
        )

    @property
    def images(self) -> NDArray[np.int64]:
        """Number of the images of all samples, in order, counted over all corpora."""
        found = []
        for part in self.parts:
            assert not isinstance(part.dataset, PackedDataset)
            found.append(part.dataset.images + part.source.image_start)
        return np.concatenate(found)

    def modality_lengths(self) -> list[int]:
        """Return the words of each sample, see ``ConversationDataset``."""
        found: list[int] = []
        for part in self.parts:
            assert isinstance(part.dataset, ConversationDataset)
            found += part.dataset.modality_lengths()
        return found

    def describe(self) -> list[str]:
        """Return what an epoch takes of each source, one line each."""
        keys = [part.source.keys for part in self.parts]
        sizes = [len(part.dataset) for part in self.parts]
        unit = "samples" if row_lengths(self) is None else "rows"
        return describe_shares([k.name for k in keys], sizes, [k.weight for k in keys], unit)


def join(parts: Sequence[Part[PartT]]) -> "PartT | Mixture":
    """Return the samples of several sources as one data set; those of one, once each, as is."""
    first = parts[0].source
    is_plain = first.keys.weight == 1 and first.image_start == first.row_start == 0
    return parts[0].dataset if len(parts) == 1 and is_plain else Mixture(parts)


def parts_of(dataset: "Trained | Mixture | None") -> list[Trained]:
    """Return the data sets that ``join`` made one of; of None, none."""
    if isinstance(dataset, Mixture):
        return [part.dataset for part in dataset.parts]
    return [] if dataset is None else [dataset]


def row_lengths(dataset: Trained | Mixture) -> NDArray[np.int64] | None:
    """Return the tokens of each packed row of a data set; None without packing."""
    lengths = [part.lengths for part in parts_of(dataset) if isinstance(part, PackedDataset)]
    return np.concatenate(lengths) if lengths else None


def _from_stream(
    num_samples: int, num_drawn: int, epoch: int, seed: tuple[int, int]
) -> NDArray[np.int64]:
    """Return the samples that an epoch takes from a stream of shuffled passes."""
    begin, end = epoch * num_drawn, (epoch + 1) * num_drawn
    first, last = begin // num_samples, (end - 1) // num_samples
    passes = [
        np.random.default_rng([*seed, number]).permutation(num_samples)
        for number in range(first, last + 1)
    ]
    skipped = begin - first * num_samples
    return np.concatenate(passes)[skipped : skipped + num_drawn]
