"""Tests of movekd.evaluate.benchmarks.submission: what the servers take."""

import json

import openpyxl

from movekd.evaluate.benchmarks.questions import Question
from movekd.evaluate.benchmarks.submission import (
    write_gqa,
    write_mmbench,
    write_sheet,
    write_vizwiz,
    write_vqav2,
)

QUESTIONS = [Question(20, "Q", "b.jpg"), Question(10, "Q", "a.jpg")]
ANSWERS = ["Two dogs.", "The Left"]


def test_vqav2_with_the_whole_split(tmp_path):
    path = tmp_path / "deep" / "up.json"
    write_vqav2(path, QUESTIONS, ANSWERS, None)
    expected = [{"question_id": 20, "answer": "2 dogs"}, {"question_id": 10, "answer": "left"}]
    assert json.loads(path.read_text()) == expected
    split = tmp_path / "test2015.jsonl"
    entries = [{"question_id": n, "image": "x.jpg", "text": "Q"} for n in (10, 15, 20)]
    split.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_vqav2(path, QUESTIONS, ANSWERS, split)
    assert json.loads(path.read_text()) == [
        {"question_id": 10, "answer": "left"},
        {"question_id": 15, "answer": ""},
        {"question_id": 20, "answer": "2 dogs"},
    ]


def test_vizwiz_by_image_and_gqa_by_text_id(tmp_path):
    write_vizwiz(tmp_path / "v.json", QUESTIONS, ANSWERS, None)
    assert json.loads((tmp_path / "v.json").read_text())[0] == {
        "image": "b.jpg",
        "answer": "2 dogs",
    }
    write_gqa(tmp_path / "g.json", QUESTIONS, ANSWERS, None)
    entries = json.loads((tmp_path / "g.json").read_text())
    assert entries[0] == {"questionId": "20", "prediction": "two dogs"}


def test_mmbench_is_a_sheet_with_a_row_a_question(tmp_path):
    question = Question(3, "...", bare="Which?\nOne.", options=("x < y", "y & z"), embedded="aaaa")
    write_mmbench(tmp_path / "m.xlsx", [question], ["B\x00\x08"], None)
    sheet = openpyxl.load_workbook(tmp_path / "m.xlsx").active
    rows = [[cell.value for cell in row] for row in sheet.iter_rows()]
    assert rows == [
        ["index", "question", "A", "B", "C", "D", "prediction"],
        [3, "Which?\nOne.", "x < y", "y & z", None, None, "B"],
    ]


def test_a_sheet_is_what_openpyxl_reads(tmp_path):
    rows = [["index", "text"], [3, " é <&> \n"], [4, "=1+1"]]
    write_sheet(tmp_path / "s.xlsx", rows)
    sheet = openpyxl.load_workbook(tmp_path / "s.xlsx").active
    assert [[cell.value for cell in row] for row in sheet.iter_rows()] == rows
