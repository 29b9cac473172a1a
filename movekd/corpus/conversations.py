"""Read, check and write LLaVA's conversations.

Input: a JSON array as LLaVA publishes it, a .jsonl file such as the ``conversations.jsonl`` of a
corpus, or a .json member of a WebDataset. Output: ``Conversation`` objects.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A bus."}]}

``image`` is a name, a list of names, or absent in a text-only entry; ``images`` means the same, and
``sample_id`` the same as ``id``. A turn may have ``role`` and ``content``, with "user" for "human"
and "assistant" for "gpt", as LLaVA-OneVision's training reads them. A "system" turn is put before
the next question: LLaVA's prompts have one fixed system text, and its training fails at another.
``question_type`` is optional. Other keys are ignored, unless they name media (``unknown_media``).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from movekd.corpus.media import unknown_media
from movekd.errors import ConfigError, shorten
from movekd.files.reading import MIB, open_regular

Role = Literal["human", "gpt"]
Change = Literal["numbered_entries", "system_turns", "replaced_characters"]
"""What reading an entry may change, by the name that ``report.json`` has for it."""

IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of an image in a turn's text."""

_ROLES: dict[str, Role | Literal["system"]] = {
    **{"human": "human", "user": "human"},
    **{"gpt": "gpt", "assistant": "gpt"},
    "system": "system",
}
_MAX_LINE_BYTES = 64 * MIB
_NUM_EXAMPLES = 3


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

    def with_placeholders(self, number: int) -> "Conversation":
        """Return the conversation with more ``<image>`` before its first question, as LLaVA does.

        It must have a question.
        """
        first = next(at for at, (role, _) in enumerate(self.turns) if role == "human")
        asked = (self.turns[first][0], f"{IMAGE_PLACEHOLDER}\n" * number + self.turns[first][1])
        return replace(self, turns=(*self.turns[:first], asked, *self.turns[first + 1 :]))

    def to_json(self) -> str:
        """Return the entry as one line of JSON in LLaVA's form."""
        entry: dict[str, Any] = {"id": self.id}
        if self.images:
            entry["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        entry["conversations"] = [{"from": role, "value": text} for role, text in self.turns]
        if self.question_type is not None:
            entry["question_type"] = self.question_type
        return json.dumps(entry, ensure_ascii=False)


class RawEntry(NamedTuple):
    """One value of a LLaVA file, not checked yet.

    Attributes:
        number: its place in the file: of an array from 0, of lines from 1.
        where: file and place, for messages.
        value: the JSON value; None if the line is not JSON.
        error: why not.
    """

    number: int
    where: str
    value: Any
    error: ConfigError | None = None

    @property
    def id(self) -> str:
        """What names the entry in a report: its id if it has one, else its number."""
        found = _identity(self.value) if isinstance(self.value, dict) else None
        return str(self.number) if found is None or isinstance(found, dict | list) else str(found)

    def parse(self, changes: list[tuple[Change, str]] | None = None) -> Conversation:
        """Return the entry as a conversation; as ``parse_conversation``."""
        if self.error is not None:
            raise self.error
        number = str(self.number)
        return parse_conversation(self.value, self.where, default_id=number, changes=changes)


def load_conversations(path: Path | str) -> list[Conversation]:
    """Return the conversations in a JSON array or a .jsonl file.

    Raises:
        ConfigError: the file cannot be read, or entries are malformed; says how many, and the
            number of the first ones.
    """
    conversations, errors = [], []
    for entry in read_entries(path):
        try:
            conversations.append(entry.parse())
        except ConfigError as error:
            errors.append((entry.number, error))
    if len(errors) > 1:
        others = ", ".join(str(number) for number, _ in errors[1 : 1 + _NUM_EXAMPLES])
        more = f"{others}, ..." if len(errors) > 1 + _NUM_EXAMPLES else others
        raise ConfigError(
            f"{errors[0][1]} {len(errors)} entries of {path} are malformed, also {more}; "
            "`movekd shards pack` lists them and leaves them out."
        )
    if errors:
        raise errors[0][1]
    return conversations


def iter_conversations(path: Path | str) -> Iterator[Conversation]:
    """Yield the conversations in a file; a .jsonl file is read line by line.

    Raises:
        ConfigError: as ``load_conversations``, but at the first malformed entry.
    """
    for entry in read_entries(path):
        yield entry.parse()


def read_entries(path: Path | str) -> Iterator[RawEntry]:
    """Yield the values in a file, malformed ones too; a .jsonl file is read line by line.

    Raises:
        ConfigError: the file is missing, no regular file, not UTF-8, or not an array.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b"")):
                    if line.strip():
                        yield _read_line(line, number + 1, f"{path}: line {number + 1}")
                return
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; expected LLaVA conversations. Correct the path."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({shorten(error)}); expected a file of JSON in UTF-8. Convert "
            "the file, or correct the path or its permissions."
        ) from None
    entries = parse_json(text, str(path))
    del text
    if not isinstance(entries, list):
        raise ConfigError(
            f"{path} holds {_describe(entries)}; expected an array of LLaVA entries. "
            "Rename the file to .jsonl if it holds one entry per line."
        )
    for number, entry in enumerate(entries):
        yield RawEntry(number, f"{path}: entry {number}", entry)


def _read_line(line: bytes, number: int, where: str) -> RawEntry:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return RawEntry(number, where, parse_json(text, where))
    except UnicodeDecodeError as error:
        reason = (
            f"{where} is no UTF-8 text (byte {error.start}); expected JSON in UTF-8. Convert it."
        )
        return RawEntry(number, where, None, ConfigError(reason))
    except ConfigError as error:
        return RawEntry(number, where, None, error)


def parse_conversation(
    entry: Any,
    where: str,
    *,
    default_id: str | None = None,
    changes: list[tuple[Change, str]] | None = None,
) -> Conversation:
    """Return one parsed JSON entry as a ``Conversation``.

    Lone surrogates become question marks, because tokenizers and Parquet refuse them.

    Args:
        entry: the parsed JSON value.
        where: file and entry number, for the message.
        default_id: id of an entry without one. Default: it must have one.
        changes: receives what was changed, and how.

    Raises:
        ConfigError: names the place, what was found and what was expected.
    """
    if not isinstance(entry, dict):
        raise _malformed(where, "the entry", entry, "an object with id and conversations")
    changes = [] if changes is None else changes
    cleaner = _Cleaner()
    identity = _identity(entry)
    if identity is None and default_id is not None:
        identity = default_id
        changes.append(("numbered_entries", f"it has no id and got {shorten(default_id)}"))
    if not isinstance(identity, str | int | float) or isinstance(identity, bool):
        raise _malformed(where, "id", identity, "a string")
    images = _images(entry, where)
    if key := unknown_media(entry):
        expected = "images under image, and no other media"
        raise _malformed(where, shorten(key), entry[key], expected)
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _malformed(where, "conversations", turns, "a list of turns")
    question_type = entry.get("question_type")
    if question_type is not None and not isinstance(question_type, str):
        raise _malformed(where, "question_type", question_type, "a string")
    parsed = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns)]
    asked = _ask_system(parsed, where)
    if len(asked) < len(parsed):
        changes.append(("system_turns", "a system turn was put before the next question"))
    conversation = Conversation(
        id=cleaner(str(identity)),
        images=tuple(cleaner(name) for name in images),
        turns=tuple((role, cleaner(text)) for role, text in asked),
        question_type=None if question_type is None else cleaner(question_type),
    )
    if cleaner.has_replaced:
        reason = "half of a surrogate pair became a question mark"
        changes.append(("replaced_characters", reason))
    return conversation


def parse_json(text: str | bytes, where: str) -> Any:
    """Return ``text`` as JSON.

    Raises:
        ConfigError: ``text`` is not JSON; names the place.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is not JSON ({shorten(error)}); expected an array of LLaVA entries, "
            "or one entry per line in a file named .jsonl."
        ) from None


def _identity(entry: dict[str, Any]) -> Any:
    found = entry.get("sample_id") if entry.get("id") is None else entry["id"]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _images(entry: dict[str, Any], where: str) -> list[str]:
    """Return the names under ``image`` or ``images``."""
    given = [(key, entry.get(key)) for key in ("image", "images")]
    lists = {
        key: found if isinstance(found, list) else [found]
        for key, found in given
        if found is not None and found != []
    }
    for key, names in lists.items():
        for name in names:
            if not isinstance(name, str) or not name:
                raise _malformed(where, key, name, "a file name or a list of file names")
    if len(lists) == 2 and lists["image"] != lists["images"]:
        raise _malformed(where, "images", entry["images"], "the same as under image")
    return next(iter(lists.values()), [])


def _turn(turn: Any, where: str) -> tuple[Role | Literal["system"], str]:
    if not isinstance(turn, dict):
        raise _malformed(where, "the turn", turn, '{"from": ..., "value": ...}')
    is_openai = "from" not in turn and "role" in turn
    who, what = ("role", "content") if is_openai else ("from", "value")
    said, text = turn.get(who), turn.get(what)
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise _malformed(where, who, said, '"human" or "gpt" (or "user", "assistant", "system")')
    if not isinstance(text, str):
        raise _malformed(where, what, text, "a string")
    return role, text


def _ask_system(
    turns: list[tuple[Role | Literal["system"], str]], where: str
) -> list[tuple[Role, str]]:
    """Return the turns with each system text put before the question that follows it."""
    asked: list[tuple[Role, str]] = []
    system: list[str] = []
    for role, text in turns:
        if role == "system":
            system.append(text)
        elif role == "human" and system:
            asked.append((role, "\n\n".join([*(s for s in system if s.strip()), text])))
            system = []
        else:
            asked.append((role, text))
    if any(text.strip() for text in system) or not asked:
        raise _malformed(where, "conversations", turns, "a human turn behind a system turn")
    return asked


class _Cleaner:
    """Replaces what UTF-8 cannot encode: JSON can escape half of a surrogate pair."""

    has_replaced = False

    def __call__(self, text: str) -> str:
        if text.isascii():
            return text
        cleaned = text.encode("utf-8", "replace").decode("utf-8")
        self.has_replaced |= cleaned != text
        return cleaned


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
