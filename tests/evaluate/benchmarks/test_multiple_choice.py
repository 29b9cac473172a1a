"""Tests of movekd.evaluate.benchmarks.multiple_choice: hand-worked cases."""

import json
from pathlib import Path

import pytest

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.multiple_choice import (
    read_letter,
    read_option,
    score_gqa,
    score_mmbench,
    score_science,
)
from movekd.evaluate.benchmarks.questions import Question


def test_gqa_is_equality_of_words(tmp_path):
    entries = {
        "01": {"answer": "yes", "types": {"structural": "verify"}},
        "02": {"answer": "pickup truck", "types": {"structural": "query"}},
        "03": {"answer": "left", "types": {"structural": "query"}},
        "04": {"answer": "left", "types": {"structural": "choose"}},
    }
    (tmp_path / "gqa.json").write_text(json.dumps(entries))
    questions = [Question(number, "?", "a.jpg") for number in entries]
    report = score_gqa(
        questions, ["Yes.", "Pickup Truck", "the left", "left"], tmp_path / "gqa.json"
    )
    assert report.value == 75
    assert report.rows["open"] == {"accuracy": 50, "questions": 2}
    assert report.rows["binary"] == {"accuracy": 100, "questions": 2}
    with pytest.raises(ConfigError, match="no answer to question 05"):
        score_gqa([Question("05", "?")], ["x"], tmp_path / "gqa.json")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. a bird", "B"),
        ("The answer is B.", "B"),
        ("So, The answer is B, a bird", "B"),
        ("D", None),  # of three choices
        ("A\nBecause", None),
        ("The answer is B", None),  # nothing behind the letter
        ("The answer is A. The answer is B.", None),
        (" B ", None),  # answers are stripped before they are stored
        ("B.", None),
        ("b", None),
        ("", None),
    ],
)
def test_a_letter_as_llava_reads_it(answer, letter):
    assert read_letter(answer, 3) == letter


def test_letters_are_those_that_llavas_program_read():
    rows = json.loads(Path(__file__).with_name("llava_science.json").read_text())["rows"]
    assert {option for _, _, option in rows} == {-1, 0, 1, 2, 3, 4}
    for answer, num_choices, option in rows:
        expected = None if option < 0 else "ABCDE"[option]
        assert read_letter(answer, num_choices) == expected, (answer, num_choices)


def write_science(folder):
    problems = {
        str(number): {"choices": ["x", "y", "z"][: 2 + number % 2], "answer": number % 2}
        for number in range(6)
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {"train": ["4", "5"], "test": ["0", "1", "2", "3"], "minitest": ["0", "1"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))


def test_science_with_and_without_images(tmp_path):
    write_science(tmp_path)
    questions = [
        Question("0", "<image>\nQ"),
        Question("1", "<image>\nQ"),
        Question("2", "Q"),
        Question("3", "Q"),
    ]
    report = score_science(questions, ["A", "A", "A. x", "B"], tmp_path)
    assert report.rows["image"] == {"accuracy": 50, "questions": 2}
    assert report.rows["text"] == {"accuracy": 100, "questions": 2}
    assert report.rows["all"]["accuracy"] == 75
    assert (report.figure, report.value) == ("accuracy of questions with an image", 50)
    only_text = score_science(questions[2:], ["A", "B"], tmp_path)
    assert only_text.rows["not asked"] == {"accuracy": 0, "questions": 2}
    assert (only_text.figure, only_text.value) == ("accuracy", 50)


def test_science_of_another_split_is_a_sentence(tmp_path):
    write_science(tmp_path)
    with pytest.raises(ConfigError, match=r"splits are train, test, minitest"):
        score_science([Question("0", "Q"), Question("5", "Q")], ["A", "A"], tmp_path)
    with pytest.raises(ConfigError, match=r"problems\.json does not exist"):
        score_science([Question("0", "Q")], ["A"], tmp_path / "none")


OPTIONS = ("a cat", "a dog", "A big cat.")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B) a dog", "B"),
        ("B: a dog", "B"),
        ("B a dog", "B"),
        ("A", "A"),
        ("A.", "A"),
        ("A big cat", "C"),  # an article, and the text of C
        ("A dog", "B"),
        ("A lion", None),
        ("a DOG.", "B"),
        ("The answer is C.", "C"),
        ("the answer is: (C)", "C"),
        ("D", None),  # of three options
        ("Big", None),
        ("cat", None),
        ("", None),
    ],
)
def test_an_option_of_mmbench(answer, letter):
    assert read_option(answer, OPTIONS) == letter


def option(number, answer, category="logic"):
    return Question(number, "?", options=("x", "y"), answer=answer, category=category)


def test_mmbench_without_copies():
    questions = [option(1, "A"), option(2, "B", "nature"), option(3, "B", "nature")]
    report = score_mmbench(questions, ["A", "B", "no idea"])
    assert report.figure == "accuracy"
    assert report.value == pytest.approx(200 / 3)
    assert report.rows["nature"] == {"accuracy": 50, "questions": 2}
    assert report.rows["all"]["unread"] == 1
    assert "vanilla" not in report.rows


def test_mmbench_with_copies_needs_all_of_them():
    questions = [option(1, "A"), option(2, "B"), option(1_000_001, "B"), option(1_000_002, "A")]
    report = score_mmbench([*questions, option(2_000_001, "A")], ["A", "B", "B", "B", "A"])
    assert report.figure == "circular accuracy"
    assert report.value == 50  # 1 and its two copies; 2 misses one
    assert report.rows["vanilla"] == {"accuracy": 100, "questions": 2}
    assert report.rows["all"]["questions"] == 2
    assert report.rows["all"]["asked"] == 5
    assert list(report.rows)[-1] == "all"
    assert score_mmbench(questions, ["A", "B", "B", "A"]).value == 100


def test_mmbench_of_a_test_split_is_a_sentence():
    with pytest.raises(ConfigError, match="question 1 has no answer in the question file"):
        score_mmbench([option(1, None)], ["A"])
