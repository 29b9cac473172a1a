"""Read, check and write LLaVA's conversations.

Input: a JSON array as LLaVA publishes it, a .jsonl file such as the ``conversations.jsonl`` of a
corpus, or a .json member of a WebDataset. Output: ``Conversation`` objects.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A bus."}]}

``image`` is a name, a list of names, or absent in a text-only entry. ``question_type`` is optional.
Other keys are ignored.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from movekd.errors import ConfigError

Role = Literal["human", "gpt"]

IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of an image in a turn's text."""


@dataclass(frozen=True)
class Conversation:
    """One entry of a LLaVA file.

    Attributes:
        id: as given; not necessarily unique.
        images: names or keys of its images, empty for text only.
        turns: (role, text) in order.
        question_type: evaluation groups by it; may be None.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[Role, str], ...]
    question_type: str | None = None

    @property
    def num_placeholders(self) -> int:
        """How often ``<image>`` stands in its text."""
        return sum(text.count(IMAGE_PLACEHOLDER) for _, text in self.turns)

    def to_json(self) -> str:
        """Return the entry as one line of JSON in LLaVA's form."""
        entry: dict[str, Any] = {"id": self.id}
        if self.images:
            entry["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        entry["conversations"] = [{"from": role, "value": text} for role, text in self.turns]
        if self.question_type is not None:
            entry["question_type"] = self.question_type
        return json.dumps(entry, ensure_ascii=False)


def load_conversations(path: Path | str) -> list[Conversation]:
    """Return the conversations in a JSON array or a .jsonl file.

    Raises:
        ConfigError: the file cannot be read, or an entry is malformed; names its number.
    """
    return list(iter_conversations(path))


def iter_conversations(path: Path | str) -> Iterator[Conversation]:
    """Yield the conversations in a file; a .jsonl file is read line by line.

    Raises:
        ConfigError: as ``load_conversations``.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file):
                    if line.strip():
                        where = f"{path}: line {number + 1}"
                        yield parse_conversation(parse_json(line, where), where)
                return
            entries = parse_json(file.read(), str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; expected LLaVA conversations. Correct the path."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); expected JSON in UTF-8. Convert the file, or "
            "correct its permissions."
        ) from None
    if not isinstance(entries, list):
        raise ConfigError(
            f"{path} holds {_describe(entries)}; expected an array of LLaVA entries. "
            "Rename the file to .jsonl if it holds one entry per line."
        )
    for number, entry in enumerate(entries):
        yield parse_conversation(entry, f"{path}: entry {number}")


def parse_conversation(entry: Any, where: str) -> Conversation:
    """Return one parsed JSON entry as a ``Conversation``.

    Lone surrogates become question marks, because tokenizers and Parquet refuse them.

    Args:
        entry: the parsed JSON value.
        where: file and entry number, for the message.

    Raises:
        ConfigError: names the place, what was found and what was expected.
    """
    if not isinstance(entry, dict):
        raise _malformed(where, "the entry", entry, "an object with id and conversations")
    identity = entry.get("id")
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise _malformed(where, "id", identity, "a string")
    image = entry.get("image")
    images = [] if image is None else image if isinstance(image, list) else [image]
    for name in images:
        if not isinstance(name, str) or not name:
            raise _malformed(where, "image", name, "a file name or a list of file names")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _malformed(where, "conversations", turns, "a list of turns")
    question_type = entry.get("question_type")
    if question_type is not None and not isinstance(question_type, str):
        raise _malformed(where, "question_type", question_type, "a string")
    return Conversation(
        id=_clean(str(identity)),
        images=tuple(_clean(name) for name in images),
        turns=tuple(_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns)),
        question_type=None if question_type is None else _clean(question_type),
    )


def parse_json(text: str | bytes, where: str) -> Any:
    """Return ``text`` as JSON.

    Raises:
        ConfigError: ``text`` is not JSON; names the place.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is not JSON ({error}); expected an array of LLaVA entries, "
            "or one entry per line in a file named .jsonl."
        ) from None


def _turn(turn: Any, where: str) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise _malformed(where, "the turn", turn, '{"from": ..., "value": ...}')
    role, text = turn.get("from"), turn.get("value")
    if role not in ("human", "gpt"):
        raise _malformed(where, "from", role, '"human" or "gpt"')
    if not isinstance(text, str):
        raise _malformed(where, "value", text, "a string")
    return role, _clean(text)


def _clean(text: str) -> str:
    """Replace what UTF-8 cannot encode: JSON can escape half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _malformed(where: str, what: str, found: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"{where}: {what} is {_describe(found)}; expected {expected}. Correct or remove the entry."
    )


def _describe(value: Any) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, dict | list):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
