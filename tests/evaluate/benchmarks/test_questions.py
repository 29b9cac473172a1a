"""Tests of movekd.evaluate.benchmarks.questions: LLaVA's three kinds of question files."""

import base64
import csv
import json

import pytest

from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.questions import (
    LETTER_PROMPT,
    Question,
    load_jsonl,
    load_options,
    load_science,
)

ASK = "Is it red?\nAnswer the question using a single word or phrase."
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]


def write_jsonl(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def write_tsv(path, *rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([columns, *rows])
    return path


def test_jsonl(tmp_path):
    path = write_jsonl(
        tmp_path / "q.jsonl",
        {"question_id": 1, "image": "a.jpg", "text": ASK, "category": "random"},
        {"question_id": "0a", "image": "b/c.jpg", "text": "Two?", "further": 1},
    )
    first, second = load_jsonl(path)
    assert first == Question(1, ASK, "a.jpg", "random")
    assert (second.id, second.image, second.category) == ("0a", "b/c.jpg", None)
    conversation = first.to_conversation("7")
    assert conversation.images == ("7",)
    assert conversation.turns == (("human", f"<image>\n{ASK}"),)


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    entry = {"question_id": "\ud800", "image": "\udc80.jpg", "text": "a\ud800?"}
    (question,) = load_jsonl(write_jsonl(tmp_path / "q.jsonl", entry))
    assert (question.id, question.image, question.prompt) == ("?", "?.jpg", "a??")


def test_science_with_and_without_an_image(tmp_path):
    turns = [
        {"from": "human", "value": "Which?\nA. x\nB. y\n<image>"},
        {"from": "gpt", "value": "A"},
    ]
    entries = [
        {"id": "4", "image": "4/image.png", "conversations": turns},
        {"id": "5", "conversations": turns},
    ]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    seen, text = load_science(tmp_path / "q.json")
    assert seen.prompt == f"<image>\nWhich?\nA. x\nB. y\n{LETTER_PROMPT}"
    assert text.prompt == f"Which?\nA. x\nB. y\n{LETTER_PROMPT}"
    assert seen.to_conversation("0").turns == (("human", seen.prompt),)
    assert text.to_conversation("1").images == ()
    assert text.to_conversation("1").turns == (("human", text.prompt),)


def test_mmbench_rows(tmp_path):
    pixels = b"pixels" * 20
    image = base64.b64encode(pixels).decode()
    path = write_tsv(
        tmp_path / "q.tsv",
        ["3", "Which?", "See it.", "x", "y\t1", "nan", "never", "B", "logic", image],
        ["1000003", "Which?", "", "y", "x", "z", "w", "", "logic", "3"],  # row 3's image
    )
    first, copy = load_options(path)
    assert first.prompt == f"See it.\nWhich?\nA. x\nB. y\t1\n{LETTER_PROMPT}"
    assert first.bare == "Which?"
    assert (first.id, first.options, first.answer) == (3, ("x", "y\t1"), "B")
    assert (copy.id, copy.options, copy.answer) == (1_000_003, tuple("yxzw"), None)
    assert copy.read_image(None) == first.read_image(None) == pixels


def test_a_long_image_fits_into_a_cell(tmp_path):
    image = base64.b64encode(bytes(300_000)).decode()
    row = ["1", "?", "", "x", "y", "", "", "A", "", image]
    (question,) = load_options(write_tsv(tmp_path / "q.tsv", row))
    assert question.read_image(None) == bytes(300_000)


def test_images_are_read_by_name():
    question = Question(1, "?", "a.jpg")
    assert question.read_image(str.encode) == b"a.jpg"
    with pytest.raises(ConfigError, match=r"question 1 has the image 'a\.jpg'; give .* --images"):
        question.read_image(None)
    with pytest.raises(ConfigError, match="image of question 1 is not base64"):
        Question(1, "?", embedded="abcde").read_image(None)
    with pytest.raises(ConfigError, match="image of question 1 is not base64"):
        Question(1, "?", embedded="ä" * 100).read_image(None)


def test_what_is_no_question_file_is_a_sentence(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", {"question_id": 1, "text": ASK})
    with pytest.raises(ConfigError, match=r"line 1: image is null; expected a question"):
        load_jsonl(path)
    with pytest.raises(ConfigError, match=r"line 1: question_id is true"):
        load_jsonl(write_jsonl(path, {"question_id": True, "image": "a", "text": "b"}))
    path.write_text('{"question_id": 1\n')
    with pytest.raises(ConfigError, match="line 1 is no JSON"):
        load_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(ConfigError, match="line 1 is not an object"):
        load_jsonl(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no question"):
        load_jsonl(path)
    with pytest.raises(ConfigError, match=r"none\.jsonl does not exist"):
        load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="is no JSON"):
        load_science(path)
    path.write_text('[{"id": "1", "conversations": []}]')
    with pytest.raises(ConfigError, match="entry 0, turn 0: value is null"):
        load_science(path)
    tsv = write_tsv(tmp_path / "q.tsv", ["1", "?"], columns=["index", "question"])
    with pytest.raises(ConfigError, match="lacks the columns A, B, image"):
        load_options(tsv)
    row = ["one", "?", "", "x", "y", "", "", "A", "", "aaaa"]
    with pytest.raises(ConfigError, match="row 1 has index 'one' and an image of 4 characters"):
        load_options(write_tsv(tsv, row))
