"""Keep the answers of one model to one question file, in LLaVA's jsonl.

    {"question_id": 1, "prompt": "Is ...", "text": "Yes", "answer_id": "", "model_id": "finetune",
     "metadata": {"model": "9f...", "questions": "31...", "max_new_tokens": 128}}

Each answer is appended when it is given. A second call resumes an interrupted file: it drops an
incomplete last line and asks only questions without an answer. ``metadata`` (empty in LLaVA's own
files) identifies the model and the question file.

Several processes can answer one question file in parts. Part i of n has its own file,
``NAME-part-i-of-n.jsonl``, i from 0; a run without a part copies their answers into ``NAME.jsonl``.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from movekd.errors import ConfigError, printable, shorten
from movekd.evaluate.benchmarks.json_files import read_lines
from movekd.evaluate.benchmarks.questions import Question

ANSWERS_DIR = "answers"
"""Default folder for answers, in the folder of a run."""
_BEGINNING = b'{"question_id": '
_MODEL_FILES = frozenset({".safetensors", ".json", ".yaml", ".bin", ".model"})


@dataclass(frozen=True)
class AnswerProvenance:
    """The model and the question file that answers belong to.

    Attributes:
        model_id: the model's name.
        model: fingerprint of the model's files.
        questions: fingerprint of the question file.
        max_new_tokens: maximum new tokens per answer.
    """

    model_id: str
    model: str
    questions: str
    max_new_tokens: int

    @classmethod
    def of(cls, run: Path, questions: Path, max_new_tokens: int) -> "AnswerProvenance":
        """Return the origin of a run's answers; reads every byte of model and questions."""
        model = run / "model" if (run / "model").is_dir() else run
        digest = xxhash.xxh3_64()
        for path in sorted(model.rglob("*")):
            name = path.relative_to(model)
            if path.suffix in _MODEL_FILES and path.is_file() and name.parts[0] != ANSWERS_DIR:
                digest.update(f"{name} {_file_digest(path)}\n".encode())
        return cls(
            printable(run.resolve().name),
            digest.hexdigest(),
            _file_digest(questions),
            max_new_tokens,
        )

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
        """Refuse a line of another origin.

        Raises:
            ConfigError: names the difference.
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
    """One of ``count`` equal parts of a question file; ``index`` counts from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str, *, option: str = "--partition", first: int = 0) -> "Part":
        """Return part i of ``i/n``.

        Args:
            text: value of the option.
            option: name of the option, for the message.
            first: number of the first part; the old ``--part`` counts from 1.

        Raises:
            ConfigError: no such part exists.
        """
        number, _, count = text.partition("/")
        is_part = number.isdecimal() and count.isdecimal()
        if not is_part or not first <= int(number) < int(count) + first:
            raise ConfigError(
                f"{option} is '{text}'; expected i/n with i from {first}: {first}/8 to "
                f"{first + 7}/8 for eight parts."
            )
        return cls(int(number) - first, int(count))

    def of(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions of this part: every ``count``-th."""
        return list(questions[self.index :: self.count])

    def beside(self, path: Path) -> Path:
        """Return the answers file of this part; one that `--part` left is used again."""
        old = path.with_name(f"{path.stem}-{self.index + 1}-of-{self.count}{path.suffix}")
        if old.exists():
            return old
        return path.with_name(f"{path.stem}-part-{self.index}-of-{self.count}{path.suffix}")


class AnswersFile:
    """The stored answers, and a method to add one. Made by ``open_answers``."""

    def __init__(
        self, file: IO[str], origin: AnswerProvenance, given: dict[tuple[str, str], str]
    ) -> None:
        self._file, self._origin, self._given = file, origin, given

    def open_questions(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions without an answer, without repeats."""
        unanswered = {q.key: q for q in reversed(questions) if q.key not in self._given}
        return list(reversed(unanswered.values()))

    def add(self, question: Question, answer: str) -> None:
        """Append an answer and flush the file."""
        line = json.dumps(self._origin.entry(question, answer), ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()
        self._given[question.key] = answer

    def texts(self, questions: Sequence[Question]) -> list[str]:
        """Return the answers to ``questions``, in order; all must exist."""
        return [self._given[question.key] for question in questions]


@contextmanager
def open_answers(
    path: Path, questions: Sequence[Question], origin: AnswerProvenance, *, take_parts: bool = True
) -> Iterator[AnswersFile]:
    """Open or create an answers file, locked against other processes.

    Args:
        path: the file.
        questions: all questions of the question file.
        origin: required origin of its answers.
        take_parts: also copy the answers of its parts.

    Raises:
        ConfigError: the file has another origin, is damaged, or is open in another process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_to_append(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{path} is being written by another process; wait for it, or give each process "
                "a part with --partition i/n."
            ) from None
        known = _by_key(questions)
        given = _read(path, known, origin, is_torn_ok=True)
        _cut_torn_line(path)
        answers = AnswersFile(file, origin, given)
        if take_parts:
            for part in _parts(path):
                for key, text in _read(part, known, origin, is_torn_ok=True).items():
                    if key not in given:
                        answers.add(known[key], text)
        yield answers


def _by_key(questions: Sequence[Question]) -> dict[tuple[str, str], Question]:
    """Return the questions by id and prompt, which is what an answers file tells apart.

    Raises:
        ConfigError: two questions have the same id and prompt and different images.
    """
    known: dict[tuple[str, str], Question] = {}
    for question in questions:
        other = known.setdefault(question.key, question)
        if (other.image, other.embedded) != (question.image, question.embedded):
            raise ConfigError(
                f"two questions have the id {shorten(question.id)} and the same text, about "
                f"different images ({shorten(other.image)}, {shorten(question.image)}); expected "
                "one answer per id and text. Give them different ids."
            )
    return known


def _open_to_append(path: Path) -> IO[str]:
    """Return the file, created if it is missing: a regular file, through no link.

    A run of a stranger may hold a link at this place, to a file that is not ours to write to.
    """
    try:
        # O_NONBLOCK: opening a FIFO without it waits for a writer
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); expected a file or a free name, no "
            "link. Give another --answers."
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is no regular file; expected one. Give another --answers.")
    return os.fdopen(descriptor, "a+", encoding="utf-8")


def _cut_torn_line(path: Path) -> None:
    """Cut an incomplete last line, which an interrupted process left; never one of somebody else.

    Raises:
        ConfigError: the last line is not the beginning of an answer.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    torn = content[end:]
    if not torn.startswith(_BEGINNING) and not _BEGINNING.startswith(torn):
        raise ConfigError(
            f"{path}: the last line is no answer of LLaVA's jsonl; expected a file of answers. "
            "Give another --answers."
        )
    if torn:
        os.truncate(path, end)


def _parts(path: Path) -> list[Path]:
    """Return the answers files of the parts of a file."""
    name = rf"{re.escape(path.stem)}-(part-)?\d+-of-\d+{re.escape(path.suffix)}"
    return sorted(part for part in path.parent.iterdir() if re.fullmatch(name, part.name))


def _read(
    path: Path,
    known: dict[tuple[str, str], Question],
    origin: AnswerProvenance,
    *,
    is_torn_ok: bool = False,
) -> dict[tuple[str, str], str]:
    """Return the answers in a file by the keys of their questions."""
    given = {}
    for where, entry in read_lines(path, "LLaVA's answers", is_torn_ok=is_torn_ok):
        origin.check(entry, where)
        key = str(entry.get("question_id")), str(entry.get("prompt"))
        text = entry.get("text")
        if key not in known or not isinstance(text, str):
            raise ConfigError(
                f"{where} answers question {key[0]}, which the question file lacks; it was edited. "
                "Give another --answers, or delete that file."
            )
        given[key] = text
    return given


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
