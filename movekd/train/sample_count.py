"""Look at every sample once before the first step: what a run cannot learn from, and how long.

Input: a data set of conversations. Output: how many are cut at ``data.model_max_length``, which
have no token to learn, by reason, and for packing the tokens of each. A loss of 0.0 over many steps
would be the only other sign.

Tokenising a large corpus as training does takes long. Without packing most samples are so short
that their bytes show it, for no tokenizer makes more tokens than bytes; of others the number of
tokens shows it. With packing all are tokenised, once, and if they are many, by several processes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch.utils.data import DataLoader, Dataset

from movekd.corpus.conversations import Conversation, Role
from movekd.corpus.worker_process import end_with_parent
from movekd.distributed import gather
from movekd.errors import ConfigError, shorten
from movekd.student.prompts import render_conversation, turn_end
from movekd.student.tokenization import IGNORED
from movekd.threads import num_cpus
from movekd.train.data import ConversationDataset, require_none_refused

Progress = Callable[[str, int, int], None]

Reason = Literal["cut", "empty", "unlabelled"]
"""Why nothing is learned from a sample.

cut: its answers lie behind ``model_max_length``. empty: all its answers are blank, so that at most
their end is learned. unlabelled: LLaVA's rules label nothing of it (see ``tokenization``).
"""

_WORDS: dict[Reason, str] = {
    "cut": "are cut before their first answer",
    "empty": "have only empty answers",
    "unlabelled": "have no label by LLaVA's rules",
}
_AT_ONCE = 1000
"""Samples from one process to the next, and from one progress report to the next."""
_PER_PROCESS = 5000
"""Samples that are worth one more process."""
_MOST_PROCESSES = 16
_MOST_BYTES = 11
"""NFKC, which some tokenizers apply, makes at most 11 bytes of one; none more of ASCII."""


@dataclass
class SampleCount:
    """What was found in a data set, or in one rank's share of it.

    Attributes:
        what: the samples, for messages.
        num_samples: conversations that were looked at.
        num_cut: those that are longer than ``model_max_length``.
        unlearned: ids of those without anything to learn, by reason.
        refused: ids of those that cannot be tokenised, with what is wrong.
        lengths: tokens of each as it trains, if asked for; 0 for a refused one.
    """

    what: str = "conversations"
    num_samples: int = 0
    num_cut: int = 0
    unlearned: dict[Reason, list[str]] = field(
        default_factory=lambda: {reason: [] for reason in get_args(Reason)}
    )
    refused: list[tuple[str, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, other: "SampleCount") -> None:
        """Add another share of the same data set; its lengths go behind those that are here."""
        self.num_samples += other.num_samples
        self.num_cut += other.num_cut
        self.refused += other.refused
        self.lengths += other.lengths
        for reason, ids in other.unlearned.items():
            self.unlearned[reason] += ids

    @property
    def has_losses(self) -> bool:
        """Whether a conversation is cut or teaches nothing."""
        return bool(self.num_cut or any(self.unlearned.values()))

    def sentence(self, max_length: int) -> str:
        """Return the counts as one line."""
        num_lost = len(self.unlearned["cut"])
        said = (
            f"{self.num_cut:,} of {self.num_samples:,} {self.what} cut at data.model_max_length "
            f"{max_length:,}, {num_lost:,} of them without an answer left"
        )
        for reason, ids in self.unlearned.items():
            if reason != "cut" and ids:
                said += f"; {len(ids):,} {_WORDS[reason]}"
        ids = [each for found in self.unlearned.values() for each in found]
        return f"{said} ({shorten(', '.join(ids), 300)})." if ids else f"{said}."

    def require_tokenized(self) -> None:
        """Refuse conversations that cannot be tokenised.

        Raises:
            ConfigError: names them.
        """
        if self.refused:
            ids = [identity for identity, _ in self.refused]
            require_none_refused(ids, self.refused[0][1], self.num_samples)

    def require_samples(self, max_length: int) -> None:
        """Refuse a run that could not learn.

        Raises:
            ConfigError: a conversation cannot be tokenised, or none teaches anything.
        """
        self.require_tokenized()
        if self.num_samples and sum(map(len, self.unlearned.values())) == self.num_samples:
            raise ConfigError(
                f"{self.sentence(max_length)} Nothing is left to learn from; expected answers "
                "within data.model_max_length. Raise it, or correct the conversations."
            )


def count_samples(
    dataset: ConversationDataset,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Progress | None = None,
    *,
    needs_lengths: bool = False,
    num_processes: int | None = None,
) -> SampleCount:
    """Return the count of every ``num_ranks``-th conversation of a data set.

    Args:
        dataset: the conversations.
        rank: the first one that is looked at.
        num_ranks: all that look, each at its share.
        progress: called with what is done, and how many samples of this share.
        needs_lengths: tokenise every sample, and return its length too.
        num_processes: that look for this one. None: as many as the CPUs and the samples are worth
            with ``needs_lengths``, otherwise 0, for most samples are told in microseconds.

    Raises:
        ConfigError: no prompt can be made with this tokenizer.
    """
    positions = range(rank, len(dataset), num_ranks)
    if num_processes is None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        most = min(_MOST_PROCESSES, num_cpus() // ranks_here)
        num_processes = min(most, len(positions) // _PER_PROCESS) if needs_lengths else 0
    looks = DataLoader(
        _Looks(dataset, positions, needs_lengths),
        batch_size=_AT_ONCE,
        num_workers=num_processes,
        collate_fn=list,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # the loader draws a number; not one of the run's
    )
    count = SampleCount()
    for found in looks:
        for look in found:
            identity = dataset.conversations[positions[count.num_samples]].id
            count.num_samples += 1
            count.num_cut += look.is_cut
            if look.error:
                count.refused.append((identity, look.error))
            if look.reason is not None:
                count.unlearned[look.reason].append(identity)
            if needs_lengths:
                count.lengths.append(look.length)
        if progress is not None and len(positions) > _AT_ONCE:
            progress("look at samples", count.num_samples, len(positions))
    return count


def count_all(
    dataset: ConversationDataset,
    rank: int,
    num_ranks: int,
    progress: Progress | None = None,
    *,
    needs_lengths: bool = False,
) -> SampleCount:
    """Return the count of all ranks, lengths in the order of the data set; each rank calls this.

    Raises:
        ConfigError: no prompt can be made with this tokenizer.
    """
    progress = progress if rank == 0 else None
    share = count_samples(dataset, rank, num_ranks, progress, needs_lengths=needs_lengths)
    shares = gather(share) if num_ranks > 1 else [share]
    count = SampleCount()
    for share in shares:
        count.add(share)
    if needs_lengths:
        count.lengths = [0] * len(dataset)
        for first, share in enumerate(shares):
            count.lengths[first::num_ranks] = share.lengths
    return count


class _Look(NamedTuple):
    """What was seen of one sample."""

    length: int = 0
    is_cut: bool = False
    reason: Reason | None = None
    error: str = ""


class _Looks(Dataset[_Look]):
    """Looks at samples: with ``needs_lengths`` at each, otherwise at those that need one."""

    def __init__(
        self, dataset: ConversationDataset, positions: Sequence[int], needs_lengths: bool
    ) -> None:
        self._dataset, self._positions = dataset, positions
        self._needs_lengths = needs_lengths
        if needs_lengths:
            return
        self._frame = _frame(dataset)
        # what LLaVA's own counting stumbles over, see tokenization
        self._odd: tuple[str, ...] = ()
        if dataset.recipe == "official" and dataset.prompt == "v1":
            unknown = dataset.tokenizer.unk_token or "<unk>"
            self._odd = ("ASSISTANT:", turn_end(dataset.tokenizer), unknown)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, at: int) -> _Look:
        position = self._positions[at]
        if self._needs_lengths or self._is_doubtful(position):
            return _look(self._dataset, position)
        return _Look()

    def _is_doubtful(self, position: int) -> bool:
        """Return whether a conversation may be cut or may teach nothing; never wrongly no."""
        dataset = self._dataset
        turns = dataset.conversations[position].turns
        text = "\n".join(turn for _, turn in turns)
        if (
            turns[0][0] == "gpt"  # a greeting, which is not learned
            or _is_empty(dataset, position)
            or any(word in text for word in self._odd)
        ):
            return True
        num_first, num_more = self._frame
        frame = num_first + num_more * len(turns) + dataset.num_image_tokens(position)
        num_bytes = len(text) if text.isascii() else _MOST_BYTES * len(text.encode())
        if frame + num_bytes < dataset.max_length:
            return False
        encoded = dataset.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return bool(frame + len(encoded) >= dataset.max_length)


def _frame(dataset: ConversationDataset) -> tuple[int, int]:
    """Return the most tokens that a prompt adds to a conversation, and more to each turn."""

    def count(num_rounds: int) -> int:
        turns: tuple[tuple[Role, str], ...] = (("human", "a"), ("gpt", "b"))
        probe = Conversation("probe", (), turns * num_rounds)
        text = render_conversation(probe, dataset.tokenizer, dataset.prompt).text
        return len(dataset.tokenizer(text, add_special_tokens=False)["input_ids"])

    # 3: words of a turn that are cut otherwise beside the prompt's words
    return count(1) + 3, (count(3) - count(2) + 1) // 2 + 3


def _look(dataset: ConversationDataset, position: int) -> _Look:
    """Tokenise one conversation as it trains, and say what it teaches."""
    try:
        cut = dataset.tokenize(position, dataset.max_length)
        is_cut = len(cut.input_ids) == dataset.max_length and (
            len(dataset.tokenize(position, None).input_ids) > dataset.max_length
        )
    except ConfigError as error:
        return _Look(error=str(error))
    reason: Reason | None = None
    if _is_empty(dataset, position):
        reason = "empty"
    elif all(label == IGNORED for label in cut.labels):
        reason = "cut" if is_cut else "unlabelled"
    return _Look(len(cut.input_ids), is_cut, reason)


def _is_empty(dataset: ConversationDataset, position: int) -> bool:
    """Return whether all answers that the prompt holds are blank."""
    turns = dataset.conversations[position].turns
    answers = [turn for role, turn in turns if role == "gpt"]
    return not any(turn.strip() for turn in answers[: 1 if dataset.prompt == "plain" else None])
