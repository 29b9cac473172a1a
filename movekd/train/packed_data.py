"""Rows of packed samples as a data set, in place of the conversations that they hold.

Input: a ``ConversationDataset`` and the length of each sample. Output: one ``Sample`` per row,
which ``data.Collator`` turns into a batch like any other, with positions that start again at 0 in
each sample. Used by ``run`` and by `movekd train --dry-run`.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import Dataset
from transformers import TrainingArguments

from movekd.student.tokenization import IGNORED
from movekd.train.config import TrainConfig
from movekd.train.data import ConversationDataset, Sample
from movekd.train.encoder_data import EncoderDataset
from movekd.train.packing import pack_rows, padding_share, row_lengths
from movekd.train.sample_count import Progress, SampleCount, count_all
from movekd.train.sampler import EMPTY, GlobalOrderSampler
from movekd.train.training_args import global_batch_size


class PackedDataset(Dataset[Sample]):
    """Rows of conversations, each row one sample of the batch.

    Args:
        conversations: the samples.
        lengths: tokens of each, from ``sample_count``.
        seed: decides which samples stand in a row together.
    """

    def __init__(
        self, conversations: ConversationDataset, lengths: Sequence[int], seed: int
    ) -> None:
        self.conversations = conversations
        self.rows = pack_rows(lengths, conversations.max_length, seed)
        self.lengths = row_lengths(self.rows, lengths)
        """Tokens of each row, (R,)."""
        self._seed = seed

    @property
    def samples_per_row(self) -> float:
        """Mean number of conversations per row."""
        return len(self.conversations) / len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        if row == EMPTY:
            return self.conversations[EMPTY]
        return join([self.conversations[position] for position in self.rows[row]])

    def fingerprint(self) -> str:
        """Return a checksum of which samples stand in which row."""
        numbers = [number for row in self.rows for number in (len(row), *row)]
        return hashlib.sha256(np.array(numbers, "<i8").tobytes()).hexdigest()

    def describe(self, batch_size: int, step_size: int) -> str:
        """Return how full the rows are, as one line.

        Args:
            batch_size: rows per forward pass of a rank.
            step_size: rows per optimizer step.
        """
        sampler = GlobalOrderSampler(
            len(self), self._seed, global_batch_size=step_size, row_lengths=self.lengths
        )
        tokens, longest = self.lengths[list(sampler)], self.conversations.max_length
        unused = 1 - tokens.sum() / (len(tokens) * longest)
        rows = "1 row" if len(self) == 1 else f"{len(self):,} rows"
        return (
            f"{len(self.conversations):,} conversations are packed into {rows} of at most "
            f"{longest:,} tokens, {self.samples_per_row:.2f} per row; "
            f"{padding_share(tokens, batch_size):.1%} of the positions are padding in batches of "
            f"{batch_size:,}, and {unused:.1%} would be if each row had {longest:,}."
        )


def join(samples: Sequence[Sample]) -> Sample:
    """Return several samples as one row; the first token of each has no label.

    No token predicts the first one of a sample that stands by itself. In a row, the last token of
    the sample before would.
    """
    labels: list[int] = []
    for sample in samples:
        labels += [IGNORED, *sample.labels[1:]]
    return Sample(
        ", ".join(sample.key for sample in samples),
        [token for sample in samples for token in sample.input_ids],
        labels,
        [image for sample in samples for image in sample.images],
        [row for sample in samples for row in sample.rows],
        tuple(len(sample.input_ids) for sample in samples),
    )


def pack(
    dataset: ConversationDataset, config: TrainConfig, lengths: Sequence[int]
) -> PackedDataset:
    """Return the rows of a run.

    Args:
        dataset: the samples.
        config: the run.
        lengths: tokens of each sample.
    """
    seed = config.training.get("data_seed")
    seed = config.training.get("seed", _SEED) if seed is None else seed
    return PackedDataset(dataset, lengths, seed)


def packed_rows(
    config: TrainConfig,
    dataset: ConversationDataset | EncoderDataset,
    arguments: TrainingArguments,
    progress: Progress | None,
    notify: Callable[[str], None] | None,
    count: SampleCount | None = None,
) -> ConversationDataset | PackedDataset | EncoderDataset:
    """Return the samples as `data.packing` asks for, and say how much of a row is padding.

    Every rank must call this; rank 0 says it.

    Args:
        config: the run.
        dataset: its samples.
        arguments: its arguments.
        progress: called while samples are tokenised.
        notify: called with the line to say.
        count: of all samples, with lengths; None: they are tokenised now.

    Raises:
        ConfigError: a conversation cannot be tokenised.
    """
    if not config.data.packing or isinstance(dataset, EncoderDataset):
        return dataset
    if count is None:
        rank, num_ranks = arguments.process_index, arguments.world_size
        count = count_all(dataset, rank, num_ranks, progress, needs_lengths=True)
        count.require_tokenized()
    rows = pack(dataset, config, count.lengths)
    if notify is not None and arguments.process_index == 0:
        notify(rows.describe(arguments.train_batch_size, global_batch_size(arguments)))
    return rows


def describe_packing(
    config: TrainConfig, dataset: ConversationDataset, lengths: Sequence[int]
) -> str:
    """Return how full the rows of a run in one process are, as one line.

    Args:
        config: the run.
        dataset: its samples.
        lengths: tokens of each sample.
    """
    batch_size = config.training.get("per_device_train_batch_size", _BATCH_SIZE)
    steps = config.training.get("gradient_accumulation_steps", 1)
    return pack(dataset, config, lengths).describe(batch_size, batch_size * steps)


_SEED, _BATCH_SIZE = 42, 8
"""Defaults of transformers.TrainingArguments."""
