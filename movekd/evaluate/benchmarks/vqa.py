"""Score VQAv2, VizWiz and TextVQA: an answer is right if three of ten people gave it.

Input: questions, a model's answers, the benchmark's annotation file. Output: a ``Report``.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from movekd.errors import ConfigError, shorten
from movekd.evaluate.benchmarks.json_files import Entry, check_entry, objects, read_json
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.report import Report, accuracy_report
from movekd.evaluate.benchmarks.vqa_normalize import normalise, normalise_evalai
from movekd.evaluate.sample import Scored

_TEXTVQA_PEOPLE = 10
_OCR = "Reference OCR token:"


class _Person(Entry):
    answer: str


class _People(Entry):
    answers: tuple[_Person, ...] = Field((), strict=False)
    answer_type: str | None = None


class _Words(Entry):
    answers: tuple[str, ...] = Field((), strict=False)


def consensus(matches: int, people: int) -> float:
    """Return the accuracy of an answer that ``matches`` of ``people`` gave.

    The accuracy is the mean, over each person left out in turn, of min(matches among the others
    / 3, 1). With ten people, 0, 1, 2, 3 and 4 or more matches give 0, 0.3, 0.6, 0.9 and 1.

    Source: visualqa.org/evaluation.
    """
    without_a_match = min((matches - 1) / 3, 1.0)
    without_another = min(matches / 3, 1.0)
    return (matches * without_a_match + (people - matches) * without_another) / people


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the VQA challenge's accuracy of one answer.

    If all people agree, answers are compared unchanged; otherwise both sides are normalised.

    Source: GT-Vision-Lab/VQA, vqaEval.py.
    """
    people = [person.replace("\n", " ").replace("\t", " ").strip() for person in people]
    if len(set(people)) > 1:
        people = [normalise(person) for person in people]
        answer = normalise(answer)
    return consensus(people.count(answer), len(people))


def vizwiz_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return VizWiz's accuracy of one answer; only the model's answer is normalised.

    People's answers are always compared as written.

    Source: VizWiz's Python API (vizwiz.org/tasks-and-datasets/vqa), VQAEval.evaluate.
    """
    return consensus(people.count(normalise(answer)), len(people))


def textvqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return TextVQA's accuracy of one answer; both sides are in TextVQA's form.

    Source: facebookresearch/mmf, TextVQAAccuracyEvaluator, as in LLaVA's m4c_evaluator.py.
    """
    forms = [normalise_evalai(person) for person in people]
    return consensus(forms.count(normalise_evalai(answer)), len(forms))


def score_vqav2(questions: Sequence[Question], answers: Sequence[str], annotations: Path) -> Report:
    """Return VQAv2's accuracy: of all and per type of answer.

    Args:
        questions: LLaVA's questions.
        answers: the model's answers.
        annotations: v2_mscoco_val2014_annotations.json.

    Raises:
        ConfigError: the file is another one, or lacks a question.
    """
    content = read_json(annotations, dict, "VQAv2's annotations")
    listed = objects(content.get("annotations", []), f"{annotations}: annotations")
    known = {str(entry.get("question_id")): entry for entry in listed}
    entries = [_find(known, str(q.id), f"question {q.id}", annotations) for q in questions]
    return _score_people(questions, entries, answers, annotations, vqa_accuracy)


def score_vizwiz(
    questions: Sequence[Question], answers: Sequence[str], annotations: Path
) -> Report:
    """Return VizWiz's accuracy: of all and per type of answer; val.json is read by image.

    Raises:
        ConfigError: the file is another one, or lacks an image.
    """
    content = read_json(annotations, list, "VizWiz's annotations")
    known = {str(entry.get("image")): entry for entry in objects(content, str(annotations))}
    entries = [_find(known, str(q.image), f"image '{q.image}'", annotations) for q in questions]
    return _score_people(questions, entries, answers, annotations, vizwiz_accuracy)


def score_textvqa(
    questions: Sequence[Question], answers: Sequence[str], annotations: Path
) -> Report:
    """Return TextVQA's accuracy; TextVQA_0.5.1_val.json is read by image and question.

    Raises:
        ConfigError: the file is another one, lacks a question, or has not ten answers to it.
    """
    content = read_json(annotations, dict, "TextVQA's annotations")
    known = {
        (str(entry.get("image_id")), str(entry.get("question")).lower()): entry
        for entry in objects(content.get("data", []), f"{annotations}: data")
    }
    scored = []
    for question, answer in zip(questions, answers, strict=True):
        asked = asked_question(question.prompt).lower()
        what = f"question '{asked}' about image '{question.id}'"
        found = _find(known, (str(question.id), asked), what, annotations)
        people = check_entry(_Words, found, f"{annotations}, {shorten(what)}").answers
        if len(people) != _TEXTVQA_PEOPLE:
            raise ConfigError(
                f"{annotations} has {len(people)} answers to {shorten(what)}; expected "
                f"{_TEXTVQA_PEOPLE}. Give the annotations of a split with answers."
            )
        scored.append(Scored(question.cluster, textvqa_accuracy(answer, people)))
    return accuracy_report(scored)


def asked_question(prompt: str) -> str:
    """Return only the question of one of LLaVA's TextVQA prompts.

    A prompt has one line each for the question, the OCR tokens (before or after it, or missing) and
    an instruction; or it is one line, "OCR tokens: ... Question: ... Short answer:".
    """
    framed = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
    if prompt.startswith("OCR tokens: ") and framed is not None:
        return framed.group(1)
    lines = [line for line in prompt.split("\n") if not line.startswith(_OCR)]
    return lines[0]


def _score_people(
    questions: Sequence[Question],
    entries: Sequence[Any],
    answers: Sequence[str],
    annotations: Path,
    accuracy: Callable[[str, Sequence[str]], float],
) -> Report:
    """Return the scores of the challenge's server for answers in TextVQA's form, as LLaVA's."""
    scored = []
    for question, entry, answer in zip(questions, entries, answers, strict=True):
        checked = check_entry(_People, entry, str(annotations))
        people = [person.answer for person in checked.answers]
        if not people:
            raise ConfigError(
                f"{annotations} has no answers of people; expected a split with answers. For "
                "another one leave --annotations out and give --submission."
            )
        kind = checked.answer_type
        score = accuracy(normalise_evalai(answer), people)
        categories = (kind,) if kind is not None else ()
        scored.append(Scored(question.cluster, score, categories))
    return accuracy_report(scored)


def _find(known: dict[Any, Any], key: Any, what: str, annotations: Path) -> Any:
    if key not in known:
        raise ConfigError(
            f"{annotations} has no entry for {shorten(what)} ({len(known)} entries); expected the "
            "annotations of the split of --questions."
        )
    return known[key]
