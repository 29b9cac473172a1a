"""Tests of movekd.evaluate.benchmarks.baseline: only answers to the same questions are compared."""

import json
from dataclasses import replace

import pytest

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.answers import AnswerProvenance
from movekd.evaluate.benchmarks.baseline import read_baseline
from movekd.evaluate.benchmarks.questions import Question

QUESTIONS = [Question(1, "Red?", "a"), Question(1, "Blue?", "a"), Question("2", "Red?", "b")]
ORIGIN = AnswerProvenance("tuned", "m1", "q1", 128)
OTHER = AnswerProvenance("base", "m2", "q1", 128)


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def answers(questions=QUESTIONS, origin=OTHER):
    return [origin.entry(q, f"to {q.prompt}") for q in questions]


def test_answers_come_in_the_order_of_the_questions(tmp_path):
    path = write(tmp_path / "a.jsonl", answers(QUESTIONS[::-1]))
    found = read_baseline(path, QUESTIONS, ORIGIN)
    assert found.texts == ["to Red?", "to Blue?", "to Red?"]
    assert (found.model_id, found.caution) == ("base", None)


def test_a_question_that_is_asked_twice_has_one_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", answers())
    assert len(read_baseline(path, [*QUESTIONS, QUESTIONS[0]], ORIGIN).texts) == 4
    write(path, [*answers(), answers()[0]])  # LLaVA's scripts answer a repeated question again
    assert len(read_baseline(path, QUESTIONS, ORIGIN).texts) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (QUESTIONS[:2], r"answers 2 of the 3 questions, lacks 1 and has 0 .* question 2\)"),
        ([*QUESTIONS, Question(7, "Why?")], r"3 of the 3 .*lacks 0 and has 1 .* question 7\)"),
        (
            [replace(QUESTIONS[0], prompt="Red? Yes or no?"), *QUESTIONS[1:]],
            r"2 of the 3 questions, lacks 1 and has 1 answers to others .* question 1\); expected "
            "answers to the same questions. Answer --questions with the other model",
        ),
        ([], "0 of the 3 questions"),
    ],
)
def test_other_questions_are_counted_and_refused(tmp_path, given, message):
    path = write(tmp_path / "a.jsonl", answers(given))
    with pytest.raises(ConfigError, match=message):
        read_baseline(path, QUESTIONS, ORIGIN)


def test_answers_to_another_question_file_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", answers(origin=replace(OTHER, questions="q2")))
    with pytest.raises(ConfigError, match=r"line 1 answers another question file \(fingerprint q2"):
        read_baseline(path, QUESTIONS, ORIGIN)


def test_two_answers_to_one_question_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [*answers(), answers()[0] | {"text": "no"}])
    with pytest.raises(ConfigError, match="line 4 is a second, other answer to question 1"):
        read_baseline(path, QUESTIONS, ORIGIN)
    write(path, [answers()[0] | {"text": None}])
    with pytest.raises(ConfigError, match="line 1 has no text; expected an answer"):
        read_baseline(path, QUESTIONS, ORIGIN)


def test_what_could_not_be_checked_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", [entry | {"metadata": {}} for entry in answers()])
    caution = read_baseline(path, QUESTIONS, ORIGIN).caution  # as LLaVA's scripts write it
    assert (
        caution == "the baseline's file does not name its question file: only ids and prompts agree"
    )
    write(path, answers(origin=replace(OTHER, max_new_tokens=32)))
    assert read_baseline(path, QUESTIONS, ORIGIN).caution == (
        "the baseline was given with --max-new-tokens 32, this model's answers with 128"
    )
