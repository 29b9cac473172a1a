"""Write the submission files of evaluation servers, for splits without public answers.

VQAv2   [{"question_id": 1, "answer": "yes"}, ...], every question of the split
VizWiz  [{"image": "VizWiz_test_00000000.jpg", "answer": "yes"}, ...]
GQA     [{"questionId": "1", "prediction": "yes"}, ...], for GQA's own eval.py too
MMBench a sheet with index, question, A to D, prediction (.xlsx)

Answers to VQAv2 and VizWiz are written in TextVQA's form, as LLaVA does.

Source: haotian-liu/LLaVA scripts/convert_{vqav2,vizwiz,mmbench}_for_submission.py,
convert_gqa_for_eval.py.
"""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from movekd.evaluate.benchmarks.multiple_choice import gqa_answer
from movekd.evaluate.benchmarks.questions import Question, load_jsonl
from movekd.evaluate.benchmarks.vqa_normalize import normalise_evalai


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
    """Write an .xlsx with one sheet; numbers stay numbers, all else is text.

    Source: ECMA-376, the required parts of a workbook.
    """
    lines = []
    for row in rows:
        cells = "".join(
            f"<c><v>{cell}</v></c>"
            if isinstance(cell, int)
            else f'<c t="inlineStr"><is><t xml:space="preserve">{_text(cell)}</t></is></c>'
            for cell in row
        )
        lines.append(f"<row>{cells}</row>")
    sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>'
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as workbook:
        for name, content in (*_PARTS.items(), ("xl/worksheets/sheet1.xml", sheet)):
            workbook.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{content}')


_SCHEMAS = "http://schemas.openxmlformats.org"
_MAIN = f"{_SCHEMAS}/spreadsheetml/2006/main"
_OFFICE = f"{_SCHEMAS}/officeDocument/2006/relationships"
_LINKS = f"{_SCHEMAS}/package/2006/relationships"
_KIND = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_PARTS = {
    "[Content_Types].xml": (
        f'<Types xmlns="{_SCHEMAS}/package/2006/content-types">'
        '<Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_KIND}.sheet.main+xml"/>'
        '<Override PartName="/xl/worksheets/sheet1.xml" '
        f'ContentType="{_KIND}.worksheet+xml"/></Types>'
    ),
    "_rels/.rels": (
        f'<Relationships xmlns="{_LINKS}"><Relationship Id="rId1" '
        f'Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>'
    ),
    "xl/workbook.xml": (
        f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
    ),
    "xl/_rels/workbook.xml.rels": (
        f'<Relationships xmlns="{_LINKS}"><Relationship Id="rId1" '
        f'Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>'
    ),
}
"""The parts around the sheet; the addresses are the format's names of its parts."""


def _text(cell: Any) -> str:
    """Return a cell's text escaped for XML, without the characters that XML cannot hold."""
    return escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(cell)))


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
