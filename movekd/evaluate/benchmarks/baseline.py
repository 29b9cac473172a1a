"""Read a second model's answers to the same questions, for a paired comparison: `--baseline`.

Input: an answers file in LLaVA's jsonl, of movekd or of LLaVA's scripts. Output: the answers in the
order of the questions. Two files that do not hold the same questions are never cut to what they
share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from movekd.errors import ConfigError, shorten
from movekd.evaluate.benchmarks.answers import AnswerProvenance
from movekd.evaluate.benchmarks.json_files import read_lines
from movekd.evaluate.benchmarks.questions import Question


@dataclass(frozen=True)
class Baseline:
    """A second model's answers.

    Attributes:
        path: their file.
        model_id: the model's name in the file.
        texts: the answers, in the order of the questions.
        caution: what could not be checked or differs in how they were given; None if nothing.
    """

    path: Path
    model_id: str
    texts: list[str]
    caution: str | None


def read_baseline(path: Path, questions: Sequence[Question], origin: AnswerProvenance) -> Baseline:
    """Return the answers of a second model to exactly these questions.

    Args:
        path: its answers file.
        questions: all questions of the question file.
        origin: that of the first model's answers.

    Raises:
        ConfigError: the file lacks questions, holds others, holds two answers to one, or belongs to
            another question file.
    """
    given: dict[tuple[str, str], str] = {}
    models: dict[str, None] = {}
    cautions: dict[str, None] = {}
    for where, entry in read_lines(path, "LLaVA's answers"):
        key, text = (str(entry.get("question_id")), str(entry.get("prompt"))), entry.get("text")
        if not isinstance(text, str):
            raise ConfigError(
                f"{where} has no text; expected an answer in LLaVA's jsonl. Give --baseline the "
                "answers file of the other model."
            )
        if given.setdefault(key, text) != text:
            raise ConfigError(
                f"{where} is a second, other answer to question {shorten(key[0])}; expected one "
                "per question. Give --baseline a file with one."
            )
        models[str(entry.get("model_id"))] = None
        cautions |= dict.fromkeys(_check_origin(entry, origin, where))
    _check_questions(path, given, questions)
    return Baseline(
        path,
        shorten(", ".join(models)),
        [given[question.key] for question in questions],
        "; ".join(cautions) or None,
    )


def _check_origin(entry: dict[str, object], origin: AnswerProvenance, where: str) -> list[str]:
    """Return what differs or is unknown; refuse answers to another question file."""
    metadata = entry.get("metadata")
    if not isinstance(metadata, dict) or "questions" not in metadata:
        return ["the baseline's file does not name its question file: only ids and prompts agree"]
    if metadata["questions"] != origin.questions:
        raise ConfigError(
            f"{where} answers another question file (fingerprint "
            f"{shorten(metadata['questions'], 40)}); this one's is {origin.questions}. Answer "
            "--questions with the other model, and give that file as --baseline."
        )
    if (most := metadata.get("max_new_tokens")) != origin.max_new_tokens:
        return [
            f"the baseline was given with --max-new-tokens {shorten(most, 20)}, this model's "
            f"answers with {origin.max_new_tokens}"
        ]
    return []


def _check_questions(
    path: Path, given: dict[tuple[str, str], str], questions: Sequence[Question]
) -> None:
    """Refuse a file that does not answer the same questions; count both sides."""
    asked = dict.fromkeys(question.key for question in questions)
    missing = [key for key in asked if key not in given]
    others = [key for key in given if key not in asked]
    if not missing and not others:
        return
    first = shorten((missing or others)[0][0], 60)
    raise ConfigError(
        f"{path} answers {len(asked) - len(missing):,} of the {len(asked):,} questions, lacks "
        f"{len(missing):,} and has {len(others):,} answers to others (the first is question "
        f"{first}); expected answers to the same questions. Answer --questions with the other "
        "model, and give that file as --baseline."
    )
