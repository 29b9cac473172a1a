"""Load the questions of a benchmark from the files of LLaVA's evaluation.

Input: one of three kinds of files. Output: a list of ``Question``.

    *.jsonl   {"question_id": 1, "image": "a.jpg", "text": "Is ...?\\nAnswer ...", "category": "x"}
    *.json    ScienceQA: [{"id": "4", "image": "4/image.png", "conversations": [{"value": ...}]}]
    *.tsv     MMBench: index, question, hint, A to D, answer, category, image in base64

A .jsonl holds the last line of its prompts ("Answer the question using a single word or phrase.").
For the other two kinds this module adds it, as LLaVA's scripts do.

Source: haotian-liu/LLaVA docs/Evaluation.md, llava/eval/model_vqa_loader.py, model_vqa_science.py,
model_vqa_mmbench.py.
"""

import base64
import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from movekd.corpus.conversations import IMAGE_PLACEHOLDER, Conversation
from movekd.errors import ConfigError, shorten
from movekd.evaluate.benchmarks.json_files import read_json, read_lines
from movekd.files.reading import MIB, read_bytes

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
"""LLaVA's scripts append this to the questions of ScienceQA and MMBench."""
_OPTIONS = "ABCD"
_ABSENT = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})
_MAX_DIGITS = 19
_MAX_TSV_BYTES = 2048 * MIB
_REFERENCE_LENGTH = 64
"""An MMBench image of fewer characters is the index of the row that holds it."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: the id in the file; several questions may share one.
        prompt: the prompt, as in LLaVA's answer files.
        image: name of the image; None if the question has none.
        category: category in the file, or None.
        bare: the question without hint and options, if the file separates them.
        options: texts of the choices A, B, ... if the file has them.
        answer: the right answer, if the question file holds it.
        embedded: the image in base64, if the question file holds it.
    """

    id: str | int
    prompt: str
    image: str | None = None
    category: str | None = None
    bare: str | None = None
    options: tuple[str, ...] = ()
    answer: str | None = None
    embedded: str | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """Identity of the question in its file."""
        return str(self.id), self.prompt

    @property
    def cluster(self) -> str:
        """What the question is drawn with: its image, or the question itself if it has none."""
        if self.embedded is not None:
            return hashlib.sha256(self.embedded.encode(errors="replace")).hexdigest()
        return self.image if self.image is not None else f"question {self.id}: {self.prompt}"

    def to_conversation(self, image: str) -> Conversation:
        """Return the question as a conversation; ``image`` names its image."""
        text = self.prompt.replace(IMAGE_PLACEHOLDER, "").strip()
        if self.image is None and self.embedded is None:
            return Conversation(str(self.id), (), (("human", text),))
        turn = f"{IMAGE_PLACEHOLDER}\n{text}"
        return Conversation(str(self.id), (image,), (("human", turn),))

    def read_image(self, read: Callable[[str], bytes] | None) -> bytes:
        """Return the question's image; ``read`` is needed if the question file does not hold it.

        Raises:
            ConfigError: ``read`` is needed and None, or the base64 is damaged.
        """
        if self.embedded is not None:
            try:
                return base64.b64decode(self.embedded, validate=False)
            except ValueError as error:  # of base64, or of characters beyond ASCII
                raise ConfigError(
                    f"the image of question {shorten(self.id)} is not base64 ({error}); download "
                    "the question file again."
                ) from None
        if read is None:
            raise ConfigError(
                f"question {shorten(self.id)} has the image '{shorten(self.image)}'; give its "
                "folder with --images."
            )
        assert self.image is not None
        return read(self.image)


def load_jsonl(path: Path) -> list[Question]:
    """Return the questions of a LLaVA .jsonl.

    Raises:
        ConfigError: the file cannot be read, or a line lacks a key; says which.
    """
    questions = []
    for where, entry in read_lines(path, "LLaVA's questions, one object per line"):
        questions.append(
            Question(
                id=_require(entry, "question_id", (str, int), where),
                prompt=_require(entry, "text", str, where),
                image=_require(entry, "image", str, where),
                category=_optional(entry, "category", where),
            )
        )
    return _some(questions, path)


def load_science(path: Path) -> list[Question]:
    """Return ScienceQA's questions of LLaVA's llava_test_CQM-A.json; some have no image.

    Raises:
        ConfigError: as ``load_jsonl``.
    """
    entries = read_json(path, list, "LLaVA's ScienceQA questions")
    questions = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        turns = _require(entry, "conversations", list, where)
        text = _require(turns[0] if turns else {}, "value", str, f"{where}, turn 0")
        image = _optional(entry, "image", where)
        text = f"{text.replace(IMAGE_PLACEHOLDER, '').strip()}\n{LETTER_PROMPT}"
        questions.append(
            Question(
                id=_require(entry, "id", (str, int), where),
                prompt=text if image is None else f"{IMAGE_PLACEHOLDER}\n{text}",
                image=image,
            )
        )
    return _some(questions, path)


def load_options(path: Path) -> list[Question]:
    """Return MMBench's questions; options end at the first missing one, as in LLaVA.

    Raises:
        ConfigError: the file cannot be read, or lacks a column or an image; says which.
    """
    rows = _read_tsv(path)
    images = {row["index"]: row["image"] for row in rows}
    questions = []
    for number, row in enumerate(rows):
        options: list[str] = []
        for letter in _OPTIONS:
            if _is_absent(row.get(letter)):
                break
            options.append(row[letter])
        lines = [] if _is_absent(row.get("hint")) else [row["hint"]]
        lines.append(row["question"])
        lines += [f"{letter}. {text}" for letter, text in zip(_OPTIONS, options, strict=False)]
        image = row["image"]
        if len(image) <= _REFERENCE_LENGTH and image in images:
            image = images[image]
        is_number = row["index"].isdecimal() and len(row["index"]) < _MAX_DIGITS
        if not is_number or _is_absent(image):
            raise ConfigError(
                f"{path}: row {number + 1} has index '{shorten(row['index'], 20)}' and an image of "
                f"{len(image)} characters; expected a number and base64. Download the file again."
            )
        questions.append(
            Question(
                id=int(row["index"]),
                prompt="\n".join([*lines, LETTER_PROMPT]),
                category=row.get("category"),
                bare=row["question"],
                options=tuple(options),
                answer=None if _is_absent(row.get("answer")) else row["answer"],
                embedded=image,
            )
        )
    return _some(questions, path)


def _read_tsv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images are longer than its default
    raw = read_bytes(path, max_bytes=_MAX_TSV_BYTES, remedy="Give MMBench's TSV.")
    try:
        with io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read ({shorten(error)}); expected MMBench's TSV. Download it again."
        ) from None
    missing = {"index", "question", "A", "B", "image"} - (rows[0].keys() if rows else set())
    if rows and missing:
        raise ConfigError(
            f"{path} lacks the columns {', '.join(sorted(missing))}; expected MMBench's TSV with "
            "index, question, hint, A to D, answer and image."
        )
    return rows


def _is_absent(cell: str | None) -> bool:
    """Return whether a cell is empty or holds pandas' word for empty."""
    return cell is None or cell.strip().lower() in _ABSENT


def _require(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(
            f"{where}: {key} is {shorten(json.dumps(value), 60)}; expected a question in LLaVA's "
            "form. Check that --questions names the benchmark's own question file."
        )
    # as in conversations: tokenizers and UTF-8 refuse half of a surrogate pair, JSON does not
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _optional(entry: dict[str, Any], key: str, where: str) -> str | None:
    return None if entry.get(key) is None else _require(entry, key, str, where)


def _some(questions: list[Question], path: Path) -> list[Question]:
    if not questions:
        raise ConfigError(f"{path} holds no question; download it again.")
    return questions
