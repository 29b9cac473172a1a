"""Tests of movekd.evaluate.benchmarks.vqa: hand-worked cases, annotations."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.vqa import (
    asked_question,
    consensus,
    score_textvqa,
    score_vizwiz,
    score_vqav2,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
)
from movekd.evaluate.benchmarks.vqa_normalize import normalise


@pytest.mark.parametrize(
    ("matches", "expected"),
    # one of ten: the nine subsets with it, which lack nobody, count 1/3; the one without counts 0
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_consensus_of_ten(matches, expected):
    assert consensus(matches, 10) == pytest.approx(expected)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_consensus_is_the_mean_over_those_left_out(counts):
    matches, people = counts
    is_match = [place < matches for place in range(people)]
    scores = [min(sum(is_match[:i] + is_match[i + 1 :]) / 3, 1) for i in range(people)]
    assert consensus(matches, people) == pytest.approx(sum(scores) / people)


def test_people_and_model_are_normalised():
    people = ["Two", "2", "two.", "the 2", *["three"] * 6]
    assert vqa_accuracy("2", people) == 1
    assert vqa_accuracy("three", people) == 1
    assert vqa_accuracy("four", people) == 0
    assert vqa_accuracy("red", ["red", "Red!", *["blue"] * 8]) == pytest.approx(0.6)


def test_where_all_agree_words_are_compared_as_they_are():
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("0", ["none"] * 10) == 0  # a number word, and nobody to disagree
    assert vqa_accuracy("0", [*["none"] * 9, "many"]) == 1


def test_textvqa_normalises_both_sides_always():
    assert textvqa_accuracy("Yes!", ["yes"] * 10) == 1
    assert textvqa_accuracy("0", ["none"] * 10) == 1
    assert textvqa_accuracy("joe's", ["Joe 's", "Joe's", *["x"] * 8]) == pytest.approx(0.6)


def test_vizwiz_takes_peoples_answers_as_they_are_written():
    assert vizwiz_accuracy("Yes.", ["yes"] * 10) == 1
    assert vizwiz_accuracy("the can", ["can"] * 3 + ["x"] * 7) == pytest.approx(0.9)
    assert vizwiz_accuracy("the can", ["the can"] * 10) == 0  # nobody can be right
    assert vizwiz_accuracy("two", ["two"] * 5 + ["2"] * 5) == 1
    assert vizwiz_accuracy("two", ["two"] * 9 + ["2"]) == pytest.approx(0.3)


@given(st.text("ab .", max_size=3), st.lists(st.sampled_from(["a", "b", "ab", "a b"]), min_size=1))
def test_vizwiz_averages_over_the_people_left_out(answer, people):
    """Each of ten is left out once, by place: equal answers of others still count."""
    given_ = normalise(answer)
    scores = [
        min(sum(other == given_ for other in people[:i] + people[i + 1 :]) / 3, 1)
        for i in range(len(people))
    ]
    assert vizwiz_accuracy(answer, people) == pytest.approx(sum(scores) / len(people))


def people(*answers):
    filled = [*answers, *["filler"] * (10 - len(answers))]
    return [
        {"answer": answer, "answer_id": number, "answer_confidence": "yes"}
        for number, answer in enumerate(filled, start=1)
    ]


def test_vqav2_by_type_of_answer(tmp_path):
    entries = [
        {"question_id": 11, "answer_type": "yes/no", "answers": people("yes", "yes")},
        {"question_id": 12, "answer_type": "number", "answers": people("two", "2", "2", "2")},
        {"question_id": 13, "answer_type": "number", "answers": people("1")},
        {"question_id": 14, "answer_type": "other", "answers": people("not asked")},
    ]
    (tmp_path / "v2.json").write_text(json.dumps({"annotations": entries}))
    questions = [Question(number, f"{number}?", "a.jpg") for number in (13, 11, 12)]
    report = score_vqav2(questions, ["One.", "Yes", "two"], tmp_path / "v2.json")
    assert report.value == pytest.approx(100 * (0.3 + 0.6 + 1) / 3)
    assert report.rows["yes/no"] == {"accuracy": pytest.approx(60), "questions": 1}
    assert report.rows["number"] == {"accuracy": pytest.approx(65), "questions": 2}
    assert list(report.rows) == ["number", "yes/no", "all"]


def test_vizwiz_is_found_by_image(tmp_path):
    answers = [{"answer": text, "answer_confidence": "maybe"} for text in ["basil"] * 3 + ["x"] * 7]
    entries = [
        {"image": "VizWiz_val_00000001.jpg", "answer_type": "other", "answers": answers},
        {
            "image": "VizWiz_val_00000000.jpg",
            "answer_type": "unanswerable",
            "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10,
        },
    ]
    (tmp_path / "val.json").write_text(json.dumps(entries))
    questions = [Question(number, "?", f"VizWiz_val_0000000{number}.jpg") for number in (0, 1)]
    report = score_vizwiz(questions, ["Unanswerable", "Basil"], tmp_path / "val.json")
    assert report.value == pytest.approx(95)
    assert report.rows["unanswerable"]["accuracy"] == 100


PROMPTS = [
    "What is it?\nReference OCR token: STOP, WAY\nAnswer the question using a single word.",
    "Reference OCR token: STOP\nWhat is it?\nAnswer the question using a single word.",
    "What is it?\nAnswer the question using a single word or phrase.",
    "OCR tokens: STOP, WAY. Question: What is it? Short answer:",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_question_in_a_textvqa_prompt(prompt):
    assert asked_question(prompt) == "What is it?"


def test_textvqa_is_found_by_image_and_question(tmp_path):
    data = [
        {"image_id": "0a", "question": "what is it?", "answers": ["stop"] * 3 + ["x"] * 7},
        {"image_id": "0a", "question": "What colour?", "answers": ["red"] * 10},
    ]
    (tmp_path / "t.json").write_text(json.dumps({"data": data}))
    questions = [Question("0a", "What Colour?\nAnswer.", "0a.jpg"), Question("0a", PROMPTS[0])]
    report = score_textvqa(questions, ["RED", "stop."], tmp_path / "t.json")
    assert report.value == pytest.approx(100 * (1 + 0.9) / 2)
    with pytest.raises(ConfigError, match="has no entry for question 'where' about image '0a'"):
        score_textvqa([Question("0a", "Where\nAnswer.")], ["x"], tmp_path / "t.json")


def test_files_of_another_split_are_sentences(tmp_path):
    (tmp_path / "v2.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(ConfigError, match=r"has no entry for question 5 \(0 entries\)"):
        score_vqav2([Question(5, "?")], ["x"], tmp_path / "v2.json")
    (tmp_path / "test.json").write_text(json.dumps([{"image": "a.jpg", "question": "?"}]))
    with pytest.raises(ConfigError, match=r"has no answers of people; .* give --submission"):
        score_vizwiz([Question(0, "?", "a.jpg")], ["x"], tmp_path / "test.json")
    data = [{"image_id": "0a", "question": "q", "answers": ["stop"] * 9}]
    (tmp_path / "t.json").write_text(json.dumps({"data": data}))
    with pytest.raises(ConfigError, match=r"has 9 answers to question 'q' .* expected 10"):
        score_textvqa([Question("0a", "q\nAnswer.")], ["x"], tmp_path / "t.json")
    with pytest.raises(ConfigError, match="holds a list; expected VQAv2's annotations"):
        score_vqav2([Question(5, "?")], ["x"], tmp_path / "test.json")
