"""Count what a run cannot learn from, before its first step.

Input: a data set of conversations. Output: how many are cut at ``data.model_max_length``, and which
have no token to learn, by reason. A loss of 0.0 over many steps would be the only other sign.

Tokenising a large corpus as training does takes long. Most samples are so short that their bytes
show it, for no tokenizer makes more tokens than bytes; of others the number of tokens shows it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from movekd.corpus.conversations import Conversation, Role
from movekd.errors import ConfigError, shorten
from movekd.student.prompts import render_conversation, turn_end
from movekd.student.tokenization import IGNORED
from movekd.train.data import ConversationDataset, require_none_refused

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
    """

    what: str = "conversations"
    num_samples: int = 0
    num_cut: int = 0
    unlearned: dict[Reason, list[str]] = field(
        default_factory=lambda: {reason: [] for reason in get_args(Reason)}
    )
    refused: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "SampleCount") -> None:
        """Add another share of the same data set."""
        self.num_samples += other.num_samples
        self.num_cut += other.num_cut
        self.refused += other.refused
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

    def require_samples(self, max_length: int) -> None:
        """Refuse a run that could not learn.

        Raises:
            ConfigError: a conversation cannot be tokenised, or none teaches anything.
        """
        if self.refused:
            ids = [identity for identity, _ in self.refused]
            require_none_refused(ids, self.refused[0][1], self.num_samples)
        if self.num_samples and sum(map(len, self.unlearned.values())) == self.num_samples:
            raise ConfigError(
                f"{self.sentence(max_length)} Nothing is left to learn from; expected answers "
                "within data.model_max_length. Raise it, or correct the conversations."
            )


def count_samples(
    dataset: ConversationDataset,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> SampleCount:
    """Return the count of every ``num_ranks``-th conversation of a data set.

    Raises:
        ConfigError: no prompt can be made with this tokenizer.
    """
    found = SampleCount()
    positions = range(rank, len(dataset), num_ranks)
    for position, is_doubtful in zip(positions, _doubts(dataset, positions), strict=True):
        found.num_samples += 1
        if is_doubtful:
            _count_one(dataset, position, found)
        if progress is not None and found.num_samples % 1000 == 0:
            progress("look at samples", found.num_samples, len(positions))
    return found


def _doubts(dataset: ConversationDataset, positions: Sequence[int]) -> Iterator[bool]:
    """Yield whether a conversation may be cut or may teach nothing; never wrongly no."""
    num_first, num_more = _frame(dataset)
    encode = dataset.tokenizer.backend_tokenizer.encode
    # what LLaVA's own counting stumbles over, see tokenization
    odd: tuple[str, ...] = ()
    if dataset.recipe == "official" and dataset.prompt == "v1":
        unknown = dataset.tokenizer.unk_token or "<unk>"
        odd = ("ASSISTANT:", turn_end(dataset.tokenizer), unknown)
    for position in positions:
        turns = dataset.conversations[position].turns
        text = "\n".join(turn for _, turn in turns)
        if (
            turns[0][0] == "gpt"  # a greeting, which is not learned
            or _is_empty(dataset, position)
            or any(word in text for word in odd)
        ):
            yield True
            continue
        frame = num_first + num_more * len(turns) + dataset.num_image_tokens(position)
        num_bytes = len(text) if text.isascii() else _MOST_BYTES * len(text.encode())
        yield (
            frame + num_bytes >= dataset.max_length
            and frame + len(encode(text, add_special_tokens=False)) >= dataset.max_length
        )


def _frame(dataset: ConversationDataset) -> tuple[int, int]:
    """Return the most tokens that a prompt adds to a conversation, and more to each turn."""

    def count(num_rounds: int) -> int:
        turns: tuple[tuple[Role, str], ...] = (("human", "a"), ("gpt", "b"))
        probe = Conversation("probe", (), turns * num_rounds)
        text = render_conversation(probe, dataset.tokenizer, dataset.prompt).text
        return len(dataset.tokenizer(text, add_special_tokens=False)["input_ids"])

    # 3: words of a turn that are cut otherwise beside the prompt's words
    return count(1) + 3, (count(3) - count(2) + 1) // 2 + 3


def _count_one(dataset: ConversationDataset, position: int, found: SampleCount) -> None:
    """Tokenise one conversation, and add it to the count."""
    conversation = dataset.conversations[position]
    try:
        cut = dataset.tokenize(position, dataset.max_length)
        is_cut = len(cut.input_ids) == dataset.max_length and (
            len(dataset.tokenize(position, None).input_ids) > dataset.max_length
        )
    except ConfigError as error:
        found.refused.append((conversation.id, str(error)))
        return
    found.num_cut += is_cut
    if _is_empty(dataset, position):
        found.unlearned["empty"].append(conversation.id)
    elif all(label == IGNORED for label in cut.labels):
        found.unlearned["cut" if is_cut else "unlabelled"].append(conversation.id)


def _is_empty(dataset: ConversationDataset, position: int) -> bool:
    """Return whether all answers that the prompt holds are blank."""
    turns = dataset.conversations[position].turns
    answers = [turn for role, turn in turns if role == "gpt"]
    return not any(turn.strip() for turn in answers[: 1 if dataset.prompt == "plain" else None])
