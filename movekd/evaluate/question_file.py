"""Load the questions of a LLaVA-style file whose last turns are the right answers.

Input: a JSON array or a .jsonl, from anybody. Output: one ``AskedQuestion`` per entry, in order.
All entries that cannot be asked are named in one error.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from movekd.corpus.conversations import Conversation, parse_conversation
from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.json_files import read_json, read_lines
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.image_folder import list_problems

_WHAT = "LLaVA's conversations"


@dataclass(frozen=True)
class AskedQuestion:
    """One question of the file.

    Attributes:
        conversation: the turns up to the question.
        right: the right answer.
        line: its id and prompt in the answers file; no other question of the file has both.
    """

    conversation: Conversation
    right: str
    line: Question


def load_questions(path: Path) -> list[AskedQuestion]:
    """Return the questions of a file; an entry without an id gets its number, counted from 0.

    Raises:
        ConfigError: the file cannot be read, has no question, or has entries that cannot be asked.
    """
    problems: dict[str, str] = {}
    conversations = []
    for number, (where, entry) in enumerate(_entries(path)):
        if isinstance(entry, dict) and "question_id" in entry and "conversations" not in entry:
            raise ConfigError(
                f"{where} has question_id and text, the form of LLaVA's benchmarks; expected "
                "conversations. Name the benchmark with --benchmark."
            )
        if isinstance(entry, dict):
            names = (entry[key] for key in ("id", "sample_id") if entry.get(key) is not None)
            entry = entry | {"id": next(names, str(number))}
        try:
            conversation = parse_conversation(entry, where)
        except ConfigError as error:
            problems[where.removeprefix(f"{path}: ")] = str(error).removeprefix(f"{where}: ")
            continue
        if problem := _problem(conversation):
            problems[where.removeprefix(f"{path}: ")] = problem
        conversations.append(conversation)
    if problems:
        raise ConfigError(
            f"{path}: {len(problems)} entries cannot be asked: {list_problems(problems)}. Correct "
            "or remove them."
        )
    if not conversations:
        raise ConfigError(f"{path} has no question to evaluate; expected a LLaVA JSON with some.")
    return _name_apart(conversations)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        yield from read_lines(path, _WHAT)
        return
    for number, entry in enumerate(read_json(path, list, f"an array of {_WHAT}")):
        yield f"{path}: entry {number}", entry


def _problem(conversation: Conversation) -> str:
    """Return why an entry cannot be asked, or an empty string."""
    turns = conversation.turns
    if len(turns) < 2 or turns[-1][0] != "gpt":
        return "does not end with a 'gpt' turn; expected the right answer there"
    asked = replace(conversation, turns=turns[:-1])
    if asked.num_placeholders != len(conversation.images):
        return (
            f"has {asked.num_placeholders} <image> in its questions and {len(conversation.images)} "
            "images; expected one for each"
        )
    return ""


def _name_apart(conversations: list[Conversation]) -> list[AskedQuestion]:
    """Return the questions; ids get ``#2``, ``#3`` ... where id and prompt are those of another."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for conversation in conversations:
        prompt = conversation.turns[-2][1]
        taken = seen[conversation.id, prompt]
        seen[conversation.id, prompt] += 1
        name = conversation.id if not taken else f"{conversation.id}#{taken + 1}"
        while taken and seen[name, prompt]:
            name += "#"
        if taken:
            seen[name, prompt] += 1
        asked = replace(conversation, turns=conversation.turns[:-1])
        found.append(AskedQuestion(asked, conversation.turns[-1][1], Question(name, prompt)))
    return found
