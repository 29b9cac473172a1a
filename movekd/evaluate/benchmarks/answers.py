"""The answers of one model to one question file, in LLaVA's jsonl, appended as they are given.

    {"question_id": 1, "prompt": "Is ...", "text": "Yes", "answer_id": "", "model_id": "finetune",
     "metadata": {"model": "9f...", "questions": "31...", "max_new_tokens": 128}}

An interrupted run is gone on with: what the file answers is not asked again, and a last line that
was torn is dropped. ``metadata``, empty in LLaVA's own files, says what the answers belong to.

Several processes answer one question file together as parts K/N, each with a file of its own,
``NAME-K-of-N.jsonl``; a run without a part takes their answers into ``NAME.jsonl``.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.json_files import read_lines
from movekd.evaluate.benchmarks.questions import Question

ANSWERS_DIR = "answers"
"""Folder of a run that answers go to, unless told."""
_MODEL_FILES = frozenset({".safetensors", ".json", ".yaml", ".bin", ".model"})


@dataclass(frozen=True)
class AnswerProvenance:
    """What answers belong to.

    Attributes:
        model_id: the model's name, for people.
        model: fingerprint of the model's files.
        questions: fingerprint of the question file.
        max_new_tokens: longest answer.
    """

    model_id: str
    model: str
    questions: str
    max_new_tokens: int

    @classmethod
    def of(cls, run: Path, questions: Path, max_new_tokens: int) -> "AnswerProvenance":
        """Return the origin of a run's answers; reads every byte of both."""
        model = run / "model" if (run / "model").is_dir() else run
        digest = xxhash.xxh3_64()
        for path in sorted(model.rglob("*")):
            name = path.relative_to(model)
            if path.suffix in _MODEL_FILES and path.is_file() and name.parts[0] != ANSWERS_DIR:
                digest.update(f"{name} {_file_digest(path)}\n".encode())
        return cls(run.resolve().name, digest.hexdigest(), _file_digest(questions), max_new_tokens)

    def entry(self, question: Question, answer: str) -> dict[str, Any]:
        """Return one line of the file."""
        return {
            "question_id": question.id,
            "prompt": question.prompt,
            "text": answer,
            "answer_id": "",
            "model_id": self.model_id,
            "metadata": {
                "model": self.model,
                "questions": self.questions,
                "max_new_tokens": self.max_new_tokens,
            },
        }

    def check(self, entry: dict[str, Any], where: str) -> None:
        """Refuse a line that belongs to something else.

        Raises:
            ConfigError: says what differs.
        """
        found = entry.get("metadata")
        found = found if isinstance(found, dict) else {}
        another = "Give another --answers, or delete that file."
        if found.get("model") != self.model:
            raise ConfigError(
                f"{where} is an answer of the model '{entry.get('model_id')}' (fingerprint "
                f"{found.get('model')}); this is '{self.model_id}' ({self.model}). {another}"
            )
        if found.get("questions") != self.questions:
            raise ConfigError(
                f"{where} answers another question file (fingerprint {found.get('questions')}); "
                f"this one's is {self.questions}. {another}"
            )
        if found.get("max_new_tokens") != self.max_new_tokens:
            raise ConfigError(
                f"{where} was given with --max-new-tokens {found.get('max_new_tokens')}; this is "
                f"{self.max_new_tokens}. Give that number, or another --answers."
            )


@dataclass(frozen=True)
class Part:
    """One of ``count`` equal parts of a question file; ``number`` starts at 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Return the part that ``K/N`` names.

        Raises:
            ConfigError: it names none.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ConfigError(
                f"--part is '{text}'; expected K/N with K from 1 to N, 1/8 to 8/8 for eight."
            )
        return cls(int(number), int(count))

    def of(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions of this part: every ``count``-th."""
        return list(questions[self.number - 1 :: self.count])

    def beside(self, path: Path) -> Path:
        """Return where this part's answers go."""
        return path.with_name(f"{path.stem}-{self.number}-of-{self.count}{path.suffix}")


class AnswersFile:
    """Answers that are there, and a way to add to them. Made by ``open_answers``."""

    def __init__(
        self, file: IO[str], origin: AnswerProvenance, given: dict[tuple[str, str], str]
    ) -> None:
        self._file, self._origin = file, origin
        self._given = given

    def open_questions(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions without an answer; of equal ones, the first."""
        unanswered = {q.key: q for q in reversed(questions) if q.key not in self._given}
        return list(reversed(unanswered.values()))

    def add(self, question: Question, answer: str) -> None:
        """Append an answer; it is in the file when this returns."""
        line = json.dumps(self._origin.entry(question, answer), ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()
        self._given[question.key] = answer

    def texts(self, questions: Sequence[Question]) -> list[str]:
        """Return the answers to ``questions``, in order; all must be there."""
        return [self._given[question.key] for question in questions]


@contextmanager
def open_answers(
    path: Path, questions: Sequence[Question], origin: AnswerProvenance, *, take_parts: bool = True
) -> Iterator[AnswersFile]:
    """Open an answers file to go on with, or make it; no second process may at the same time.

    Args:
        path: the file.
        questions: all questions of the question file.
        origin: what the answers in it must belong to.
        take_parts: take in the answers of parts of it as well.

    Raises:
        ConfigError: it belongs to another model or question file, is damaged, or is open elsewhere.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{path} is being written by another process; wait for it, or give --part K/N to "
                "each of several."
            ) from None
        _drop_torn_line(path)
        known = {question.key: question for question in questions}
        given = _read(path, known, origin)
        answers = AnswersFile(file, origin, given)
        if take_parts:
            for part in sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")):
                for key, text in _read(part, known, origin, is_torn_ok=True).items():
                    if key not in given:
                        answers.add(known[key], text)
        yield answers


def _read(
    path: Path,
    known: dict[tuple[str, str], Question],
    origin: AnswerProvenance,
    *,
    is_torn_ok: bool = False,
) -> dict[tuple[str, str], str]:
    """Return the answers in a file by the keys of their questions."""
    given = {}
    lines = read_lines(path, "LLaVA's answers", is_torn_ok=is_torn_ok)
    for where, entry in lines:
        origin.check(entry, where)
        key = str(entry.get("question_id")), str(entry.get("prompt"))
        text = entry.get("text")
        if key not in known or not isinstance(text, str):
            raise ConfigError(
                f"{where} answers question {key[0]} as no line written here does; it was edited. "
                "Give another --answers, or delete that file."
            )
        given[key] = text
    return given


def _drop_torn_line(path: Path) -> None:
    """Cut off what an interrupted process left behind the last line's end."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()
