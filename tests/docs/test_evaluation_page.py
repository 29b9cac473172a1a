"""docs/evaluation.md names every benchmark, and which of them write a submission file."""

import json
import re
from pathlib import Path

from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.evaluate.benchmarks.registry import BENCHMARKS

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_benchmarks() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0]: row for row in cells if len(row) == 5 and row[0] in BENCHMARKS}
    assert set(table) == set(BENCHMARKS)
    for name, row in table.items():
        assert bool(row[4]) is (BENCHMARKS[name].submit is not None)
    ruled = [name for row in cells if len(row) == 3 for name in row[0].split(", ")]
    assert set(BENCHMARKS) <= set(ruled)


def test_the_options_that_it_names_exist() -> None:
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"}).stdout
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE.partition("## Exact match")[2]))
    assert named == {
        *(
            "--questions",
            "--images",
            "--benchmark",
            "--annotations",
            "--submission",
            "--submission-split",
        ),
        *("--answers", "--partition", "--max-new-tokens", "--baseline", "--json"),
    }
    assert all(option in shown for option in named)


def test_the_example_scores(tmp_path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(code, names)
    entries = [{"question_id": n, "image": "x.jpg", "text": "Which?"} for n in (1, 2)]
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "words.json").write_text('{"1": "cat", "2": "dog"}')
    asked = names["load_mine"](questions)
    report = names["score_mine"](asked, ["cat", "cow"], tmp_path / "words.json")
    assert (report.figure, report.value) == ("accuracy", 50.0)
