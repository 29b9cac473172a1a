"""Score GQA, ScienceQA and MMBench: one word or one letter is right.

Input: questions, a model's answers, the benchmark's annotations. Output: a ``Report``.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from movekd.corpus.conversations import IMAGE_PLACEHOLDER
from movekd.errors import ConfigError, shorten
from movekd.evaluate.benchmarks.json_files import Entry, check_entry, read_json
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.report import Report, accuracy_report
from movekd.evaluate.sample import ALL, Scored

LETTERS = "ABCDE"
_VANILLA = "vanilla"
_COPIES = 1_000_000
"""MMBench adds 1,000,000, 2,000,000, ... to the index for copies with rotated options."""


class _GqaTypes(Entry):
    structural: str | None = None


class _GqaEntry(Entry):
    answer: str
    types: _GqaTypes = _GqaTypes()


class _Problem(Entry):
    choices: list[str]
    answer: int


def gqa_answer(answer: str) -> str:
    """Return an answer in GQA's form: lower case, no period at its end.

    Source: haotian-liu/LLaVA scripts/convert_gqa_for_eval.py.
    """
    return answer.rstrip(".").lower()


def score_gqa(questions: Sequence[Question], answers: Sequence[str], annotations: Path) -> Report:
    """Return GQA's accuracy: of all, binary and open questions (testdev_balanced_questions.json).

    Raises:
        ConfigError: the file is another one, or lacks a question or its answer.

    Source: GQA's eval.py: equality; a question is open if its structural type is query.
    """
    known = read_json(annotations, dict, "GQA's questions by id")
    scored = []
    for question, answer in zip(questions, answers, strict=True):
        found = known.get(str(question.id))
        if not isinstance(found, dict) or "answer" not in found:
            raise ConfigError(
                f"{annotations} has no answer to question {shorten(question.id)} ({len(known)} "
                "questions); expected testdev_balanced_questions.json. For a split without answers "
                "leave --annotations out and give --submission."
            )
        entry = check_entry(_GqaEntry, found, f"{annotations}: question {shorten(question.id)}")
        kind = entry.types.structural
        categories = () if kind is None else ("open" if kind == "query" else "binary",)
        is_right = gqa_answer(answer) == entry.answer
        scored.append(Scored(question.cluster, float(is_right), categories))
    return accuracy_report(scored)


def read_letter(answer: str, num_choices: int) -> str | None:
    """Return the letter that an answer chooses, or None if LLaVA's program says FAILED.

    The answer is only the letter; or it starts with the letter, a period and a space; or it says
    "The answer is X" with one more character after X, exactly once. A letter beyond the choices
    does not count.

    Source: haotian-liu/LLaVA llava/eval/eval_science_qa.py.
    """
    starts_with_letter = answer[:1] in set(LETTERS) and answer[1:3] in ("", ". ")
    if starts_with_letter:
        letter = answer[0]
    else:
        said = re.findall("The answer is ([A-Z]).", answer)  # the period is any character, as there
        letter = said[0] if len(said) == 1 else ""
    return letter if letter in set(LETTERS[:num_choices]) else None


def score_science(
    questions: Sequence[Question], answers: Sequence[str], annotations: Path
) -> Report:
    """Return ScienceQA's accuracy: of all questions, and of those with an image (in papers).

    A question of the split that was not asked counts as wrong, as in LLaVA.

    Args:
        questions: LLaVA's questions.
        answers: the model's answers.
        annotations: folder of problems.json and pid_splits.json.

    Raises:
        ConfigError: a file is missing, or no split holds the questions.
    """
    problems = read_json(annotations / "problems.json", dict, "ScienceQA's problems by id")
    splits = read_json(annotations / "pid_splits.json", dict, "ScienceQA's splits, lists of ids")
    asked = {
        str(question.id): (question, answer)
        for question, answer in zip(questions, answers, strict=True)
    }
    for name, ids in splits.items():
        if not isinstance(ids, list) or not all(isinstance(number, str) for number in ids):
            raise ConfigError(
                f"{annotations / 'pid_splits.json'}: {shorten(name)} is {shorten(repr(ids), 60)}; "
                "expected a list of ids. Download the file again."
            )
    split = next((ids for ids in splits.values() if asked.keys() <= set(ids)), None)
    if split is None or not problems.keys() >= set(split):
        raise ConfigError(
            f"{annotations} has no split with the questions of --questions (its splits are "
            f"{shorten(', '.join(splits))}); expected the problems.json and pid_splits.json of one "
            "release."
        )
    scored = []
    for number in split:
        if number not in asked:
            scored.append(Scored(f"not asked: {number}", 0.0, ("not asked",)))
            continue
        question, answer = asked[number]
        where = f"{annotations / 'problems.json'}: {shorten(number)}"
        problem = check_entry(_Problem, problems[number], where)
        letter = read_letter(answer, len(problem.choices))
        kind = "image" if IMAGE_PLACEHOLDER in question.prompt else "text"
        is_right = letter is not None and LETTERS.index(letter) == problem.answer
        scored.append(Scored(question.cluster, float(is_right), (kind,)))
    if not any("image" in unit.categories for unit in scored):
        return accuracy_report(scored)
    return accuracy_report(scored, "image", "accuracy of questions with an image")


def read_option(answer: str, options: Sequence[str]) -> str | None:
    """Return the letter that an answer to a question of MMBench chooses, or None.

    Three forms count: a letter at the answer's start (by itself, in brackets or before a mark); the
    whole text of one option; "answer is X". MMBench's server asks a language model about all other
    answers; here they are wrong.

    Source: MMBench (arXiv 2307.06281), section 4: matching of labels and texts is tried first.
    """
    letters = LETTERS[: len(options)]
    stripped = answer.strip()
    found = re.match(rf"\(?([{letters}])(?:[.,:)\s]|$)", stripped) if letters else None
    is_article = stripped.startswith("A ") and len(stripped) > 2  # "A dog" chooses nothing
    if found and not is_article:
        return found.group(1)
    bare = stripped.rstrip(".").casefold()
    same = [
        letter
        for letter, text in zip(letters, options, strict=True)
        if text.strip().rstrip(".").casefold() == bare
    ]
    if len(same) == 1:
        return same[0]
    said = re.search(rf"answer is:? \(?([{letters}])\b", answer) if letters else None
    return said.group(1) if said else None


def score_mmbench(
    questions: Sequence[Question], answers: Sequence[str], _: Path | None = None
) -> Report:
    """Return MMBench's accuracy; circular if the file has copies with rotated options.

    Circular: a question is right if all its copies are. Vanilla: only the first copies count.

    Raises:
        ConfigError: a question has no answer in the file.
    """
    right: dict[int, list[bool]] = defaultdict(list)
    categories: dict[int, str | None] = {}
    images: dict[int, str] = {}
    unread, vanilla = 0, []
    for question, answer in zip(questions, answers, strict=True):
        if question.answer is None:
            raise ConfigError(
                f"question {question.id} has no answer in the question file; expected a split "
                "whose answers are public. For this one give --submission."
            )
        letter = read_option(answer, question.options)
        unread += letter is None
        number = int(question.id) % _COPIES
        right[number].append(letter == question.answer.strip())
        images.setdefault(number, question.cluster)
        if int(question.id) < _COPIES:
            is_right = float(right[number][-1])
            vanilla.append(Scored(question.cluster, is_right, (_VANILLA,), in_all=False))
            categories[number] = question.category
    scored = [
        Scored(
            images[number],
            float(all(copies)),
            (kind,) if (kind := categories.get(number)) else (),
        )
        for number, copies in right.items()
    ]
    is_circular = len(right) < len(questions)
    if is_circular:
        scored += vanilla
    report = accuracy_report(scored, figure="circular accuracy" if is_circular else "accuracy")
    order = sorted(report.rows, key=lambda name: (name == ALL, name == _VANILLA))
    rows = {name: report.rows[name] for name in order}
    rows[ALL] |= {"asked": len(questions), "unread": unread}
    return replace(report, rows=rows)
