"""Tests of movekd.evaluate.benchmarks.answers: resuming, parts, and one file per run."""

import json
import os
from dataclasses import replace

import pytest

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.answers import AnswerProvenance, Part, open_answers
from movekd.evaluate.benchmarks.questions import Question

QUESTIONS = [
    Question(1, "Red?", "a.jpg"),
    Question(1, "Blue?", "a.jpg"),  # one image, two questions, as in TextVQA and MME
    Question("2", "Red?", "b.jpg"),
    Question(3, "Grün?", "c.jpg"),
]
ORIGIN = AnswerProvenance("finetune", "m1", "q1", 128)


def answer(path, questions=QUESTIONS, origin=ORIGIN, count=99, **keys):
    """Answer up to ``count`` open questions; return which were open."""
    with open_answers(path, QUESTIONS, origin, **keys) as answers:
        open_ones = answers.open_questions(questions)
        for question in open_ones[:count]:
            answers.add(question, f"says {question.prompt} ✓")
        return open_ones


def test_lines_are_llavas(tmp_path):
    assert answer(tmp_path / "deep" / "a.jsonl") == QUESTIONS
    lines = (tmp_path / "deep" / "a.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert list(first) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (first["question_id"], first["text"]) == (1, "says Red? ✓")
    assert first["model_id"] == "finetune"
    assert json.loads(lines[2])["question_id"] == "2"
    assert len(lines) == 4


@pytest.mark.parametrize("count", range(5))
def test_an_interrupted_file_is_resumed(tmp_path, count):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    answer(whole)
    answer(path, count=count)
    assert answer(path) == QUESTIONS[count:]
    assert path.read_bytes() == whole.read_bytes()
    with open_answers(path, QUESTIONS, ORIGIN) as answers:
        assert answers.open_questions(QUESTIONS) == []
        assert answers.texts(QUESTIONS[::-1]) == [f"says {q.prompt} ✓" for q in QUESTIONS[::-1]]


def test_a_torn_last_line_is_asked_again_wherever_it_was_torn(tmp_path):
    whole = tmp_path / "whole.jsonl"
    answer(whole)
    content = whole.read_bytes()
    third_ends = len(b"".join(content.splitlines(keepends=True)[:3]))
    for length in range(third_ends, len(content)):  # through the middle of letters, too
        path = tmp_path / "a.jsonl"
        path.write_bytes(content[:length])
        assert answer(path) == QUESTIONS[3:]
        assert path.read_bytes() == content


def test_equal_questions_are_asked_once(tmp_path):
    twice = [QUESTIONS[0], QUESTIONS[0]]
    with open_answers(tmp_path / "a.jsonl", twice, ORIGIN) as answers:
        (question,) = answers.open_questions(twice)
        answers.add(question, "yes")
        assert answers.texts(twice) == ["yes", "yes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "m2"}, r"line 1 is an answer of the model 'finetune' \(fingerprint m1\)"),
        (
            {"questions": "q2"},
            r"answers another question file \(fingerprint q1\); this one's is q2",
        ),
        ({"max_new_tokens": 8}, "was given with --max-new-tokens 128; this is 8"),
    ],
)
def test_answers_of_something_else_are_refused(tmp_path, change, message):
    answer(tmp_path / "a.jsonl", count=1)
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message):
        answer(tmp_path / "a.jsonl", origin=replace(ORIGIN, **change))
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_foreign_and_edited_files_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    line = {"question_id": 1, "prompt": "Red?", "text": "x", "model_id": "llava", "metadata": {}}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match="answer of the model 'llava'"):
        answer(path)
    edited = ORIGIN.entry(Question(9, "Red?"), "x")
    path.write_text(json.dumps(edited) + "\n")
    with pytest.raises(ConfigError, match="answers question 9, which the question file lacks"):
        answer(path)
    path.write_text("{}\nnot json\n{}\n")
    with pytest.raises(ConfigError, match="line 2 is no JSON"):
        answer(path)


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with (
        open_answers(path, QUESTIONS, ORIGIN),
        pytest.raises(ConfigError, match="being written by another process"),
        open_answers(path, QUESTIONS, ORIGIN),
    ):
        pass
    assert answer(path) == QUESTIONS  # and free again


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_make_the_whole(tmp_path, count):
    whole = tmp_path / "a.jsonl"
    parts = [Part(index, count) for index in range(count)]
    seen = [question for part in parts for question in part.of(QUESTIONS)]
    assert sorted(map(str, seen)) == sorted(map(str, QUESTIONS))
    for part in parts:
        path = part.beside(whole)
        assert answer(path, part.of(QUESTIONS), take_parts=False) == part.of(QUESTIONS)
    with parts[0].beside(whole).open("a") as file:
        file.write('{"torn')  # somebody may be writing it
    assert answer(whole) == []
    assert len(whole.read_text().splitlines()) == len(QUESTIONS)
    assert answer(whole) == []


def test_parts_of_another_run_are_refused(tmp_path):
    answer(tmp_path / "a-1-of-2.jsonl", count=1, take_parts=False)
    with pytest.raises(ConfigError, match=r"a-1-of-2\.jsonl: line 1 is an answer of the model"):
        answer(tmp_path / "a.jsonl", origin=replace(ORIGIN, model="m2"))


@pytest.mark.parametrize("text", ["2/2", "3/2", "1", "a/b", "0/0", "-1/2"])
def test_no_part(text):
    with pytest.raises(ConfigError, match=f"--partition is '{text}'; expected i/n with i from 0"):
        Part.parse(text)
    assert Part.parse("2/8") == Part(2, 8)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_the_old_option_counts_parts_from_one(text):
    old = {"option": "--part", "first": 1}
    with pytest.raises(ConfigError, match=f"--part is '{text}'; expected i/n with i from 1"):
        Part.parse(text, **old)
    assert [Part.parse(f"{k}/3", **old) for k in (1, 2, 3)] == [Part(i, 3) for i in range(3)]


def test_a_part_resumes_the_file_that_the_old_option_left(tmp_path):
    whole, part = tmp_path / "a.jsonl", Part(0, 2)
    answer(tmp_path / "a-1-of-2.jsonl", part.of(QUESTIONS), count=1, take_parts=False)
    assert answer(part.beside(whole), part.of(QUESTIONS), take_parts=False) == [QUESTIONS[2]]
    other = Part(1, 2)  # its old number is 2: nothing is there to resume
    assert answer(other.beside(whole), other.of(QUESTIONS), take_parts=False) == QUESTIONS[1::2]
    assert answer(whole) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_an_origin_knows_every_byte_of_model_and_questions(tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    questions = tmp_path / "q.jsonl"
    for path in (model / "config.yaml", model / "a.safetensors", questions):
        path.write_text("0")
    (tmp_path / "run" / "answers").mkdir()
    first = AnswerProvenance.of(tmp_path / "run", questions, 8)
    assert first.model_id == "run"
    (tmp_path / "run" / "answers" / "q.jsonl").write_text("an answer")
    assert AnswerProvenance.of(tmp_path / "run", questions, 8) == first
    assert AnswerProvenance.of(model, questions, 8).model == first.model
    (model / "answers").mkdir()  # an export has no folder `model`
    (model / "answers" / "upload.json").write_text("an answer")
    assert AnswerProvenance.of(model, questions, 8).model == first.model
    (model / "a.safetensors").write_text("1")
    changed = AnswerProvenance.of(tmp_path / "run", questions, 8)
    assert changed == replace(first, model=changed.model) != first
    (model / "a.safetensors").write_text("0")
    (model / "a.safetensors").rename(model / "b.safetensors")
    assert AnswerProvenance.of(tmp_path / "run", questions, 8) != first
    questions.write_text("1")
    assert AnswerProvenance.of(tmp_path / "run", questions, 8).questions != first.questions


def test_equal_ids_and_texts_about_different_images_are_refused(tmp_path):
    questions = [Question(1, "Red?", "a.jpg"), Question(1, "Red?", "b.jpg")]
    with (
        pytest.raises(ConfigError, match=r"two questions have the id 1 .* \(a\.jpg, b\.jpg\)"),
        open_answers(tmp_path / "a.jsonl", questions, ORIGIN),
    ):
        pass


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b"my notes\nand more", b"{}", b"\xff"]
)
def test_a_file_of_somebody_else_is_never_written_to(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        answer(path)
    assert path.read_bytes() == content


def test_links_and_special_files_are_not_written_to(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("")
    (tmp_path / "a.jsonl").symlink_to(mine)
    with pytest.raises(ConfigError, match=r"cannot be written .* no link"):
        answer(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="is no regular file"):
        answer(tmp_path / "b.jsonl")
    assert mine.read_text() == ""


def test_only_parts_of_this_file_are_gathered(tmp_path):
    path = tmp_path / "q[1].jsonl"
    answer(Part(0, 2).beside(path), Part(0, 2).of(QUESTIONS), take_parts=False)
    (tmp_path / "q[1]-hard-part-0-of-2.jsonl").write_text("of another question file\n")
    assert answer(path) == QUESTIONS[1::2]
