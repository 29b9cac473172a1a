"""Score answers to a LLaVA-style file by exact match, per question type: `movekd evaluate`."""

import math
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.evaluate.sample import ALL, Sample, Scored, accuracy_sample


@dataclass(frozen=True)
class Score:
    """Number of right answers among all questions."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy over questions, which must be independent.

        Where several questions are about one image, take those of ``exact_match_sample``.

        Source: Wilson (1927).
        """
        z, n, p = 1.959964, self.total, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def split_questions(
    conversations: Sequence[Conversation],
) -> tuple[list[Conversation], list[str]]:
    """Return the conversations without their last answer, and those answers.

    Raises:
        ConfigError: the last turn of a conversation is not an answer.
    """
    questions, answers = [], []
    for conversation in conversations:
        if len(conversation.turns) < 2 or conversation.turns[-1][0] != "gpt":
            raise ConfigError(
                f"conversation '{conversation.id}' does not end with a 'gpt' turn; expected the "
                "right answer there."
            )
        questions.append(replace(conversation, turns=conversation.turns[:-1]))
        answers.append(conversation.turns[-1][1])
    return questions, answers


def normalise(answer: str) -> str:
    """Return an answer in lower case, without punctuation at its ends or doubled spaces."""
    return " ".join(answer.lower().split()).strip(string.punctuation + " ")


def is_right(expected: str, found: str) -> bool:
    """Return whether an answer matches, by ``normalise``."""
    return normalise(expected) == normalise(found)


def exact_match(
    conversations: Sequence[Conversation], right: Sequence[str], given: Sequence[str]
) -> dict[str, Score]:
    """Return the score of each question type, and of ``all``.

    Raises:
        ConfigError: the file has no question.
    """
    if not conversations:
        raise ConfigError(
            "the file has no question to evaluate; expected a LLaVA JSON file with some."
        )
    counts: defaultdict[str, list[bool]] = defaultdict(list)
    for conversation, expected, found in zip(conversations, right, given, strict=True):
        counts[conversation.question_type or "other"].append(is_right(expected, found))
        counts[ALL].append(is_right(expected, found))
    order = sorted(counts, key=lambda name: (name == ALL, name))
    return {name: Score(sum(counts[name]), len(counts[name])) for name in order}


def exact_match_sample(
    conversations: Sequence[Conversation], right: Sequence[str], given: Sequence[str]
) -> Sample:
    """Return the accuracies in percent as a sample of images, for intervals and comparisons.

    A question with several images is drawn with the first one; one without any is drawn by itself.
    """
    triples = zip(conversations, right, given, strict=True)
    return accuracy_sample(
        Scored(
            asked.images[0] if asked.images else f"question {number}",
            float(is_right(expected, found)),
            (asked.question_type or "other",),
        )
        for number, (asked, expected, found) in enumerate(triples)
    )
