"""Score POPE and MME, whose questions are answered with yes or no.

Input: questions, a model's answers, the benchmark's labels. Output: a ``Report``.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from movekd.errors import ConfigError, shorten
from movekd.evaluate.benchmarks.json_files import read_lines
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.report import Report, Row
from movekd.evaluate.intervals import Array
from movekd.evaluate.sample import Figures, Sample, percent
from movekd.files.reading import MIB, read_text

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's subtasks. Source: MME's eval_tool/calculation.py."""
_SUMS = {"perception": PERCEPTION, "cognition": COGNITION}

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
    counts_QC = np.array([_pope_counts(*pair) for pair in zip(labels, said, strict=True)], float)
    figures = pope_figures(counts_QC.sum(0, keepdims=True))
    return {name: float(value[0]) for name, value in figures.items()} | {"questions": len(labels)}


def _pope_counts(label: bool, said: bool) -> list[bool]:
    """Return of one question: right, yes and right, said yes, labelled yes, asked."""
    return [label == said, label and said, said, label, True]


def pope_figures(sums_RC: Array) -> dict[str, Array]:
    """Return POPE's five figures in percent; NaN without any question.

    Args:
        sums_RC: numbers of right answers, right yes, yes, labels yes, questions.
    """
    right, true_yes, said, labels, asked = sums_RC.T
    precision, recall = percent(true_yes, said), percent(true_yes, labels)
    both = precision + recall
    figures = {
        "accuracy": percent(right, asked),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / np.where(both > 0, both, 1.0),
        "yes_ratio": percent(said, asked),
    }
    return {name: np.where(asked > 0, value, np.nan) for name, value in figures.items()}


def score_pope(questions: Sequence[Question], answers: Sequence[str], annotations: Path) -> Report:
    """Return POPE's figures per category, and their means; papers print the mean F1.

    Args:
        questions: with ``category`` random, popular or adversarial.
        answers: the model's answers.
        annotations: folder of coco_pope_<category>.json, or one of these files.

    Raises:
        ConfigError: a file is missing, or lacks a question.
    """
    kinds = list(dict.fromkeys(question.category for question in questions))
    own = {kind: slice(5 * number, 5 * number + 5) for number, kind in enumerate(kinds)}
    labels = {kind: _pope_labels(_pope_path(annotations, kind)) for kind in kinds}
    counts_QS = np.zeros((len(questions), 5 * len(kinds)))
    for at, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        key, kind = (question.image, question.prompt.partition("\n")[0]), question.category
        if key not in labels[kind]:
            raise ConfigError(
                f"{_pope_path(annotations, kind)} has no label for '{shorten(key[1])}' about "
                f"{shorten(key[0])} ({len(labels[kind])} labels); "
                "expected the labels that --questions was made from."
            )
        counts_QS[at, own[kind]] = _pope_counts(labels[kind][key], pope_says_yes(answer))

    def figures(sums_RS: Array) -> Figures:
        rows = {str(kind): pope_figures(sums_RS[:, own[kind]]) for kind in kinds}
        names = next(iter(rows.values()))
        nothing = np.zeros(len(sums_RS))
        return rows | {
            "mean": {n: sum((row[n] for row in rows.values()), nothing) / len(rows) for n in names}
        }

    images = [question.cluster for question in questions]
    sample = Sample(images, counts_QS, figures, ("mean", "f1"))
    rows: dict[str, Row] = sample.rows()
    for kind in kinds:
        rows[str(kind)]["questions"] = int(counts_QS[:, own[kind]][:, -1].sum())
    rows["mean"]["questions"] = len(questions)
    return Report("mean f1", rows["mean"]["f1"], rows, sample)


def _pope_path(annotations: Path, category: str | None) -> Path:
    """Return the file of a category's labels."""
    if category is not None and not re.fullmatch(r"\w{1,40}", category):  # a part of a path
        raise ConfigError(
            f"a question's category is '{shorten(category)}'; expected random, popular or "
            "adversarial. Check that --questions is llava_pope_test.jsonl."
        )
    return annotations / f"coco_pope_{category}.json" if annotations.is_dir() else annotations


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
        said, label = mme_says(answer), _mme_label(annotations, subtask, stem, question.prompt)
        unread[subtask] += said == "other"
        images.setdefault(subtask, {}).setdefault(stem, []).append(said == label)
    for subtask, answered in images.items():
        for stem, right in answered.items():
            if len(right) != 2:
                raise ConfigError(
                    f"{subtask}/{shorten(stem)} has {len(right)} questions; expected two per "
                    "image. Give the whole question file."
                )
    there = [subtask for subtask in unread if subtask in images]
    own = {subtask: slice(3 * number, 3 * number + 3) for number, subtask in enumerate(there)}
    every = [(subtask, stem) for subtask in there for stem in images[subtask]]
    counts_IS = np.zeros((len(every), 3 * len(there)))
    for at, (subtask, stem) in enumerate(every):
        right = images[subtask][stem]
        counts_IS[at, own[subtask]] = sum(right), all(right), 1

    def figures(sums_RS: Array) -> Figures:
        rows = {subtask: _mme_figures(sums_RS[:, own[subtask]]) for subtask in there}
        nothing = np.zeros(len(sums_RS))
        return rows | {
            name: {"score": sum((rows[s]["score"] for s in there if s in subtasks), nothing)}
            for name, subtasks in _SUMS.items()
        }

    names = [f"{subtask}/{stem}" for subtask, stem in every]
    sample = Sample(names, counts_IS, figures, ("perception", "score"))
    rows: dict[str, Row] = sample.rows()
    for subtask in there:
        rows[subtask] |= {"questions": 2 * len(images[subtask]), "neither": unread[subtask]}
    for name, subtasks in _SUMS.items():
        rows[name]["subtasks"] = len(set(there) & set(subtasks))
    return Report("perception score", rows["perception"]["score"], rows, sample)


def _mme_figures(sums_RC: Array) -> dict[str, Array]:
    """Return a subtask's figures; the sums are right answers, images with both right, images."""
    right, both, asked = sums_RC.T
    accuracy = percent(right, 2 * asked, empty=np.nan)
    accuracy_plus = percent(both, asked, empty=np.nan)
    return {
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "score": accuracy + accuracy_plus,
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
