"""Write the submission files of evaluation servers, for splits without public answers.

VQAv2   [{"question_id": 1, "answer": "yes"}, ...], every question of the split
VizWiz  [{"image": "VizWiz_test_00000000.jpg", "answer": "yes"}, ...]
GQA     [{"questionId": "1", "prediction": "yes"}, ...], for GQA's own eval.py too
MMBench a sheet with index, question, A to D, prediction (.xlsx)

Answers to VQAv2 and VizWiz are written in TextVQA's form, as LLaVA does.

Source: haotian-liu/LLaVA scripts/convert_{vqav2,vizwiz,mmbench}_for_submission.py,
convert_gqa_for_eval.py.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from movekd.evaluate.benchmarks.multiple_choice import gqa_answer
from movekd.evaluate.benchmarks.questions import Question, load_jsonl
from movekd.evaluate.benchmarks.vqa_normalize import normalise_evalai
from movekd.files.ownership import write_durably


def write_vqav2(
    path: Path, questions: Sequence[Question], answers: Sequence[str], split: Path | None
) -> None:
    """Write VQAv2's file.

    Args:
        path: the file to write.
        questions: the asked questions, such as test-dev.
        answers: the model's answers.
        split: LLaVA's question file of the whole split. The server expects all its questions;
            those that were not asked get an empty answer.
    """
    given = {q.id: normalise_evalai(text) for q, text in zip(questions, answers, strict=True)}
    wanted = [q.id for q in (questions if split is None else load_jsonl(split))]
    _write(path, [{"question_id": number, "answer": given.get(number, "")} for number in wanted])


def write_vizwiz(
    path: Path, questions: Sequence[Question], answers: Sequence[str], _: Path | None
) -> None:
    """Write VizWiz's file."""
    pairs = zip(questions, answers, strict=True)
    _write(path, [{"image": q.image, "answer": normalise_evalai(text)} for q, text in pairs])


def write_gqa(
    path: Path, questions: Sequence[Question], answers: Sequence[str], _: Path | None
) -> None:
    """Write the predictions for GQA's eval.py and server."""
    pairs = zip(questions, answers, strict=True)
    _write(path, [{"questionId": str(q.id), "prediction": gqa_answer(text)} for q, text in pairs])


def write_mmbench(
    path: Path, questions: Sequence[Question], answers: Sequence[str], _: Path | None
) -> None:
    """Write MMBench's .xlsx sheet."""
    rows: list[list[Any]] = [["index", "question", *"ABCD", "prediction"]]
    for question, text in zip(questions, answers, strict=True):
        options = [*question.options, "", "", "", ""][:4]
        rows.append([question.id, question.bare or "", *options, text])
    write_sheet(path, rows)


def write_sheet(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write an .xlsx with one sheet; numbers stay numbers, all else is text, also "=1+1"."""
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in rows:
        sheet.append([cell if isinstance(cell, int) else _text_cell(sheet, cell) for cell in row])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    book.save(content)
    write_durably(path, content.getvalue())


def _text_cell(sheet: Any, value: Any) -> Any:
    """Return a cell of text, without the control characters that XML cannot hold."""
    cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", str(value)))
    cell.data_type = "s"  # openpyxl takes text that begins with "=" for a formula
    return cell


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries, ensure_ascii=False)
    write_durably(path, text.encode(errors="replace"))  # a file of a stranger holds any character
