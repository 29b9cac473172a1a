"""Score POPE and MME, whose questions are answered with yes or no.

Input: questions, a model's answers, the benchmark's labels. Output: a ``Report``.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from movekd.errors import ConfigError, shorten
from movekd.evaluate.benchmarks.json_files import read_lines
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.report import Report, Row
from movekd.files.reading import MIB, read_text

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's subtasks. Source: MME's eval_tool/calculation.py."""

_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Please answer yes or no.",
)


def pope_says_yes(answer: str) -> bool:
    """Return False if the first sentence of an answer has No, no or not; else True.

    Source: haotian-liu/LLaVA llava/eval/eval_pope.py.
    """
    sentence = answer.partition(".")[0].replace(",", "")
    return not {"No", "no", "not"} & set(sentence.split(" "))


def mme_says(answer: str) -> str:
    """Return yes, no or other, by the first four letters; yes is looked for first.

    Source: MME's eval_tool/calculation.py.
    """
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def pope_row(labels: Sequence[bool], said: Sequence[bool]) -> Row:
    """Return POPE's five figures; yes is positive, and a division by zero gives 0."""
    right = sum(label == answer for label, answer in zip(labels, said, strict=True))
    true_yes = sum(label and answer for label, answer in zip(labels, said, strict=True))
    precision, recall = _share(true_yes, sum(said)), _share(true_yes, sum(labels))
    both = precision + recall
    return {
        "accuracy": _share(right, len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_ratio": _share(sum(said), len(labels)),
        "questions": len(labels),
    }


def score_pope(questions: Sequence[Question], answers: Sequence[str], annotations: Path) -> Report:
    """Return POPE's figures per category, and their means; papers print the mean F1.

    Args:
        questions: with ``category`` random, popular or adversarial.
        answers: the model's answers.
        annotations: folder of coco_pope_<category>.json, or one of these files.

    Raises:
        ConfigError: a file is missing, or lacks a question.
    """
    rows: dict[str, Row] = {}
    for category in dict.fromkeys(question.category for question in questions):
        if category is not None and not re.fullmatch(r"\w{1,40}", category):  # a part of a path
            raise ConfigError(
                f"a question's category is '{shorten(category)}'; expected random, popular or "
                "adversarial. Check that --questions is llava_pope_test.jsonl."
            )
        path = annotations
        if annotations.is_dir():
            path = annotations / f"coco_pope_{category}.json"
        labels = _pope_labels(path)
        right, said = [], []
        for question, answer in zip(questions, answers, strict=True):
            if question.category != category:
                continue
            key = question.image, question.prompt.partition("\n")[0]
            if key not in labels:
                raise ConfigError(
                    f"{path} has no label for '{shorten(key[1])}' about {shorten(key[0])} "
                    f"({len(labels)} labels); "
                    "expected the labels that --questions was made from."
                )
            right.append(labels[key])
            said.append(pope_says_yes(answer))
        rows[str(category)] = pope_row(right, said)
    names = next(iter(rows.values()))
    mean = {name: sum(row[name] for row in rows.values()) / len(rows) for name in names}
    mean["questions"] = len(questions)
    return Report("mean f1", mean["f1"], rows | {"mean": mean})


def score_mme(questions: Sequence[Question], answers: Sequence[str], annotations: Path) -> Report:
    """Return accuracy and accuracy+ per subtask, and MME's two sums; papers print perception.

    An image has two questions; accuracy+ is the share of images with both answered right. A
    subtask scores 100 (accuracy + accuracy+), 200 at most.

    Args:
        questions: with ids such as ``OCR/0001.jpg``; two per image.
        answers: the model's answers.
        annotations: the folder MME_Benchmark_release_version.

    Raises:
        ConfigError: a subtask is unknown, an image does not have two questions, or a question
            has no label.
    """
    images: dict[str, dict[str, list[bool]]] = {}
    unread = dict.fromkeys((*PERCEPTION, *COGNITION), 0)
    for question, answer in zip(questions, answers, strict=True):
        subtask, _, rest = str(question.id).partition("/")
        if subtask not in unread or not rest:
            raise ConfigError(
                f"question {shorten(question.id)} names no subtask of MME; expected an id such as "
                f"'OCR/0001.jpg', with one of {', '.join(unread)}."
            )
        stem = Path(rest).stem
        said, right = mme_says(answer), _mme_label(annotations, subtask, stem, question.prompt)
        unread[subtask] += said == "other"
        images.setdefault(subtask, {}).setdefault(stem, []).append(said == right)
    rows = {
        subtask: _mme_row(subtask, images[subtask]) | {"neither": unread[subtask]}
        for subtask in unread
        if subtask in images
    }
    sums: dict[str, Row] = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [rows[subtask] for subtask in subtasks if subtask in rows]
        sums[name] = {"score": sum(row["score"] for row in there), "subtasks": len(there)}
    return Report("perception score", sums["perception"]["score"], rows | sums)


def _mme_row(subtask: str, images: dict[str, list[bool]]) -> Row:
    for stem, right in images.items():
        if len(right) != 2:
            raise ConfigError(
                f"{subtask}/{shorten(stem)} has {len(right)} questions; expected two per image. "
                "Give the whole question file."
            )
    accuracy = _share(sum(map(sum, images.values())), 2 * len(images))
    accuracy_plus = _share(sum(map(all, images.values())), len(images))
    return {
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "score": accuracy + accuracy_plus,
        "questions": 2 * len(images),
    }


def _mme_label(folder: Path, subtask: str, stem: str, prompt: str) -> str:
    """Return the right answer from an image's text file: question, tab, answer, two lines."""
    place = folder / subtask
    if (place / "questions_answers_YN").is_dir():
        place = place / "questions_answers_YN"
    path = place / f"{stem}.txt"
    remedy = "Then give MME_Benchmark_release_version as --annotations."
    lines = read_text(path, max_bytes=MIB, remedy=remedy).splitlines()
    labels = {
        _bare(question): right.strip().lower()
        for question, tab, right in (line.partition("\t") for line in lines)
        if tab
    }
    label = labels.get(_bare(prompt))
    if label not in ("yes", "no"):
        raise ConfigError(
            f"{path} has no yes or no for '{shorten(_bare(prompt))}'; expected it after a tab, as "
            "in MME's own files. Download them again."
        )
    return label


def _bare(prompt: str) -> str:
    """Return a question without its instruction and with single spaces."""
    for instruction in _INSTRUCTIONS:
        prompt = prompt.replace(instruction, "")
    return " ".join(prompt.split())


def _pope_labels(path: Path) -> dict[tuple[str | None, str], bool]:
    labels: dict[tuple[str | None, str], bool] = {}
    for where, entry in read_lines(path, "POPE's labels, coco_pope_<category>.json"):
        if entry.get("label") not in ("yes", "no"):
            raise ConfigError(
                f"{where}: label is '{shorten(entry.get('label'))}'; expected yes or no. Give the "
                "folder of POPE's coco_pope_*.json as --annotations."
            )
        labels[str(entry.get("image")), str(entry.get("text"))] = entry["label"] == "yes"
    return labels


def _share(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0
