"""Tests of movekd.evaluate.benchmarks.pope_mme: POPE's and MME's figures, worked out by hand."""

import json

import pytest

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.pope_mme import (
    COGNITION,
    PERCEPTION,
    mme_says,
    pope_row,
    pope_says_yes,
    score_mme,
    score_pope,
)
from movekd.evaluate.benchmarks.questions import Question

SUFFIX = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("Yes", True),
        ("yes.", True),
        ("No", False),
        ("no, there is", False),
        ("There is not one", False),
        ("Yes. No.", True),  # the first sentence alone
        ("NO", True),  # these three words, as they are written
        ("Nothing", True),
        ("no\n", True),  # and only spaces part words
        ("", True),
    ],
)
def test_pope_takes_an_answer_as_llava_does(answer, is_yes):
    assert pope_says_yes(answer) is is_yes


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *[("Yes", "yes"), ("no.", "no"), ("A yes", "other"), ("I know", "other"), ("NO", "no")],
        *[("know", "no"), ("", "other"), (" yes", "yes"), ("not", "no"), ("maybe", "other")],
    ],
)
def test_mme_reads_four_letters(answer, said):
    assert mme_says(answer) == said


def test_five_figures_of_a_confusion_matrix():
    labels = [True] * 5 + [False] * 5
    said = [True, True, True, False, False, True, False, False, False, False]
    row = pope_row(labels, said)
    assert row["accuracy"] == pytest.approx(70)
    assert row["precision"] == pytest.approx(75)
    assert row["recall"] == pytest.approx(60)
    assert row["f1"] == pytest.approx(2 * 75 * 60 / 135)
    assert row["yes_ratio"] == pytest.approx(40)
    assert row["questions"] == 10


def test_quotients_without_a_denominator_are_0():
    row = pope_row([False, False, False, True], [False] * 4)
    assert (row["precision"], row["recall"], row["f1"], row["yes_ratio"]) == (0, 0, 0, 0)
    assert row["accuracy"] == 75


def write_labels(folder, category, labels):
    lines = [
        json.dumps({"question_id": n, "image": image, "text": text, "label": label})
        for n, (image, text, label) in enumerate(labels, start=1)
    ]
    (folder / f"coco_pope_{category}.json").write_text("\n".join(lines) + "\n")


def test_pope_a_category_and_the_mean(tmp_path):
    write_labels(tmp_path, "random", [("a", "Cat?", "yes"), ("a", "Dog?", "no")])
    write_labels(tmp_path, "popular", [("a", "Cat?", "no"), ("b", "Cat?", "yes")])
    questions = [
        Question(1, "Dog?" + SUFFIX, "a", "random"),  # in another order than the labels
        Question(2, "Cat?" + SUFFIX, "b", "popular"),
        Question(3, "Cat?" + SUFFIX, "a", "random"),
        Question(4, "Cat?" + SUFFIX, "a", "popular"),
    ]
    report = score_pope(questions, ["Yes", "Yes", "Yes", "No"], tmp_path)
    assert report.rows["random"]["f1"] == pytest.approx(2 * 50 * 100 / 150)
    assert report.rows["popular"]["f1"] == 100
    assert report.rows["mean"]["accuracy"] == pytest.approx(75)
    assert report.rows["mean"]["questions"] == 4
    assert report.figure == "mean f1"
    assert report.value == pytest.approx((200 / 3 + 100) / 2)
    alone = score_pope(questions[::2], ["Yes", "Yes"], tmp_path / "coco_pope_random.json")
    assert alone.rows["random"] == report.rows["random"]


def test_pope_labels_of_other_questions_are_a_sentence(tmp_path):
    write_labels(tmp_path, "random", [("a", "Cat?", "yes")])
    with pytest.raises(ConfigError, match=r"no label for 'Dog\?' about a \(1 labels\)"):
        score_pope([Question(1, "Dog?" + SUFFIX, "a", "random")], ["Yes"], tmp_path)
    with pytest.raises(ConfigError, match=r"coco_pope_popular\.json does not exist"):
        score_pope([Question(1, "Cat?" + SUFFIX, "a", "popular")], ["Yes"], tmp_path)
    write_labels(tmp_path, "random", [("a", "Cat?", "maybe")])
    with pytest.raises(ConfigError, match="line 1: label is 'maybe'; expected yes or no"):
        score_pope([Question(1, "Cat?" + SUFFIX, "a", "random")], ["Yes"], tmp_path)


def write_mme(folder, subtask, stem, lines, *, deep=False):
    place = folder / subtask / "questions_answers_YN" if deep else folder / subtask
    place.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"{question}\t{right}" for question, right in lines)
    (place / f"{stem}.txt").write_text(text + "\n")


def mme_question(subtask, stem, text):
    name = f"{subtask}/{stem}.png"
    return Question(name, text + SUFFIX, name, subtask)


def test_mme_scores_questions_and_images(tmp_path):
    ask = "Is it {}? Please answer yes or no."
    both = [(ask.format("red"), "Yes"), (ask.format("blue"), "No")]
    for stem in ("1", "2", "3"):
        write_mme(tmp_path, "color", stem, both, deep=True)
    write_mme(tmp_path, "OCR", "1", [("Is it  'A'?  Please answer yes or no.", "Yes"), both[1]])
    write_mme(tmp_path, "code_reasoning", "1", both)
    questions = [
        mme_question("color", stem, f"Is it {name}?")
        for stem in ("1", "2", "3")
        for name in ("red", "blue")
    ]
    questions += [mme_question("OCR", "1", "Is it 'A'?"), mme_question("OCR", "1", "Is it blue?")]
    questions += [mme_question("code_reasoning", "1", f"Is it {n}?") for n in ("blue", "red")]
    answers = ["Yes", "No", "yes", "Yes", "maybe", "no", "Yes", "No", "No", "No"]
    report = score_mme(questions, answers, tmp_path)
    # color: 4 of 6 questions, 1 of 3 images; OCR: all; code_reasoning: 1 of 2, 0 of 1
    assert report.rows["color"]["accuracy"] == pytest.approx(400 / 6)
    assert report.rows["color"]["accuracy_plus"] == pytest.approx(100 / 3)
    assert report.rows["color"]["score"] == pytest.approx(100)
    assert report.rows["color"]["neither"] == 1
    assert report.rows["OCR"]["score"] == 200
    assert report.rows["code_reasoning"]["score"] == 50
    assert report.rows["perception"] == {"score": pytest.approx(300), "subtasks": 2}
    assert report.rows["cognition"] == {"score": 50, "subtasks": 1}
    assert report.value == pytest.approx(300)


def test_mme_has_ten_and_four_subtasks():
    assert (len(set(PERCEPTION)), len(set(COGNITION))) == (10, 4)


def test_mme_that_cannot_be_scored_is_a_sentence(tmp_path):
    write_mme(tmp_path, "OCR", "1", [("Red?", "Yes")])
    with pytest.raises(ConfigError, match="OCR/1 has 1 questions; expected two per image"):
        score_mme([mme_question("OCR", "1", "Red?")], ["Yes"], tmp_path)
    with pytest.raises(ConfigError, match=r"no yes or no for 'Blue\?'"):
        score_mme([mme_question("OCR", "1", "Blue?")], ["Yes"], tmp_path)
    with pytest.raises(ConfigError, match="give MME_Benchmark_release_version"):
        score_mme([mme_question("OCR", "2", "Red?")], ["Yes"], tmp_path)
    with pytest.raises(ConfigError, match="question 7 names no subtask of MME"):
        score_mme([Question(7, "Red?")], ["Yes"], tmp_path)
