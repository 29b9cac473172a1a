"""Every command of docs/reproduce.md runs, with small models.

``conftest.run`` says what is replaced. The released checkpoint, which the page imports first, is
here an export of the run that the page trains, so its commands run last.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llava_eval
from movekd.cli.main import app
from movekd.evaluate.benchmarks.registry import BENCHMARKS
from movekd.resources import resource_dir

PAGE = (Path(__file__).parents[2] / "docs/reproduce.md").read_text(encoding="utf-8")
FIGURES = {
    "LLaVA-1.5": [78.5, 62.0, 58.2, 50.0, 85.9, 66.8, 1510.7, 64.3],
    "MoVE-KD v1.0": [79.5, 63.2, 58.3, 52.3, 86.9, 69.3, 1524.5, 66.3],
    "MoVE-KD v1.1": [79.9, 63.9, 59.6, 52.7, 86.3, 69.8, 1509.1, 67.4],
}


def commands() -> list[list[str]]:
    """Return the page's commands in order, as words; those of a loop once per iteration."""
    found = []
    for line in re.findall(r"^    (\S.*)$", PAGE.replace("\\\n", " "), re.MULTILINE):
        loop = re.fullmatch(r"for k in ([\d ]+); do (.*) & done; wait", line)
        turns = loop.group(1).split() if loop else [""]
        for turn in turns:
            text = (loop.group(2) if loop else line).replace("$k", turn)
            if turn:
                text = text.replace("$((k-1))", str(int(turn) - 1))
            found.append(shlex.split(text.removesuffix(" &")))
    return [words for words in found if words != ["wait"]]


def rows(name: str) -> list[list[str]]:
    """Return the cells of the page's table rows that begin with ``name``."""
    lines = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def is_first_check(words: list[str]) -> bool:
    return words[1] == "import" or "models/7b" in words


def test_the_page_has_the_commands_that_are_followed() -> None:
    kinds = [" ".join(w[w.index("movekd") + 1 :][:2]) for w in commands() if not is_first_check(w)]
    expected = ["shards pack"] * 2 + ["cache plan"] * 2 + ["cache build"] * 8 + ["cache verify"] * 2
    assert kinds == [*expected, *["train --cache"] * 2, *["evaluate runs/finetune"] * 16]
    evaluated = [w[w.index("--benchmark") + 1] for w in commands() if "--benchmark" in w]
    of_the_paper = "vqav2 gqa vizwiz sqa textvqa pope mme mmbench"
    assert set(evaluated) == set(of_the_paper.split())
    assert set(evaluated) <= set(BENCHMARKS)
    config = next(w[w.index("--config_file") + 1] for w in commands() if "--config_file" in w)
    assert (resource_dir("pipelines").parent / config).is_file()
    devices = [w[-1] for w in commands() if w[1:3] == ["cache", "build"]]
    assert devices == [f"cuda:{number}" for number in range(8)]


def test_every_command_runs(run: Any, crops: Any) -> None:
    options = llava_eval.write_benchmarks(Path("playground/data/eval"), crops)
    printed = {}
    for words in [w for w in commands() if not is_first_check(w)]:
        printed[" ".join(words)] = run(words)
    scored = [text for command, text in printed.items() if "--benchmark" in command]
    for name, figure in (("gqa", "accuracy"), ("pope", "mean f1"), ("mme", "perception score")):
        assert any(f"runs/finetune: {name}, {figure}" in text for text in scored)
    assert sum("not scored" in text for text in scored) == 10  # vizwiz, eight parts, vqav2
    asked = json.loads(Path("upload/vqav2.json").read_text())
    split = Path(options["vqav2"]["questions"]).with_name("llava_vqav2_mscoco_test2015.jsonl")
    assert len(asked) == len(split.read_text().splitlines())
    assert {path.name for path in Path("upload").iterdir()} == {
        *("vqav2.json", "vizwiz.json", "mmbench.xlsx")
    }
    evaluated = {w[w.index("--benchmark") + 1] for w in commands() if "--benchmark" in w}
    stems = {Path(options[name]["questions"]).stem for name in evaluated}
    answers = {path.stem for path in Path("runs/finetune/answers").glob("*.jsonl")}
    assert stems <= answers

    run(shlex.split("movekd export runs/finetune --format official --out MoVE-KD-7b-v1.1"))
    first = [w for w in commands() if is_first_check(w)]
    assert [w[1] for w in first] == ["import", "evaluate"]
    for words in first:
        run(words)
    released = Path("models/7b/answers/llava_pope_test.jsonl").read_text().splitlines()
    trained = Path("runs/finetune/answers/llava_pope_test.jsonl").read_text().splitlines()
    assert [json.loads(a)["text"] for a in released] == [json.loads(a)["text"] for a in trained]


def test_bytes_and_hours_are_those_of_cache_plan(run: Any) -> None:
    corpora = [words for words in commands() if words[1:3] == ["shards", "pack"]]
    plans = []
    for pack, words in zip(
        corpora, (w for w in commands() if w[1:3] == ["cache", "plan"]), strict=True
    ):
        run(pack)
        result = CliRunner().invoke(app, [*words[1:], "--json"])  # of the teachers that ship
        assert result.exception is None, result.exception
        plans.append(json.loads(result.stdout))
    for name in ("clip", "eva02", "convnext", "sam", "all"):
        (cells,) = (row for row in rows(name) if len(row) == 6)
        expected = []
        for plan in plans:
            chosen = [t for t in plan["teachers"] if t["is_spec"] and name in (t["teacher"], "all")]
            total, hours = (sum(t[key] for t in chosen) for key in ("total_bytes", "hours"))
            megabytes = sum(t["row_bytes"] for t in chosen) / 1e6
            expected += [f"{total / 1e12:.2f}", f"{hours:.1f}"]
        assert cells[1:] == [f"{megabytes:.2f}", *expected]


@pytest.mark.parametrize("name", FIGURES)
def test_expected_figures_are_the_published_ones(name: str) -> None:
    (cells,) = rows(name)
    assert [float(cell) for cell in cells[1:]] == FIGURES[name]
