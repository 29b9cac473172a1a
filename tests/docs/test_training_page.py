"""`movekd train` accepts the YAML and the commands of docs/training.md."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import scenes
from movekd.cli.main import app
from movekd.train.config import load_config
from text_kit import write_mistral

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "training.md").read_text(encoding="utf-8")
COMMANDS = "".join(
    (DOCS / page).read_text(encoding="utf-8")
    for page in ("training.md", "howto/resume.md", "howto/multi-gpu.md")
)


@pytest.fixture
def student_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "student.yaml").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "student.yaml"


def test_the_file_is_valid_and_its_values_are_the_recipes(student_yaml: Path) -> None:
    shown = load_config(student_yaml)
    content = yaml.safe_load(student_yaml.read_text())
    needed = {
        "recipe": content["recipe"],
        "stage": content["stage"],
        "student": {k: content["student"][k] for k in ("vision_tower", "language_model")},
        "distill": {"teachers": content["distill"]["teachers"]},
        "data": {"shards": content["data"]["shards"]},
        "training": content["training"],
    }
    (student_yaml.parent / "needed.yaml").write_text(yaml.safe_dump(needed))
    assert load_config(student_yaml.parent / "needed.yaml") == shown


def test_its_commands_are_understood(student_yaml: Path) -> None:
    lines = re.findall(r"^    ((?:movekd|torchrun) .*?)(?:\s+#.*)?$", COMMANDS, re.MULTILINE)
    lines = [line for line in lines if "--config student.yaml" in line]
    assert len(lines) == 7
    for line in lines:
        words = shlex.split(line)
        words = [*words[words.index("movekd") + 1 :], "--dry-run"]
        result = CliRunner().invoke(app, [*words, "--set", "distill.teachers=[clip, sam]"])
        assert result.exit_code == 0, result.output
        assert "stage: pretrain" in result.output


def test_the_tokens_of_the_page_are_those_that_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    write_mistral(tmp_path / "lmsys/vicuna-7b-v1.5")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "training.md", "exec"), {})
    assert capsys.readouterr().out == "['', '2', '</s>']\n"


def test_the_sample_on_the_page_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    head, *lines = block.splitlines()
    shown = " ".join(line.strip() for line in lines)
    entry = {
        "id": "000000033471",
        "image": "n01440764_tench.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nHow many fish are there?"},
            {"from": "gpt", "value": "2"},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "In a hand."},
        ],
    }
    Image.new("RGB", (64, 48)).save(tmp_path / "n01440764_tench.jpg")
    (tmp_path / "c.json").write_text(json.dumps([entry]))
    write_mistral(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    tower = Path(scenes.__file__).parent / "weights/clip"
    run = {
        "recipe": "official",
        "stage": "finetune",
        "student": {"vision_tower": str(tower), "language_model": "llm"},
        "data": {"shards": "data"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(run))
    runner = CliRunner()
    pack = ["shards", "pack", "--llava-json", "c.json", "--images", ".", "--output", "data"]
    assert runner.invoke(app, pack).exit_code == 0
    printed = runner.invoke(app, ["train", "--config", "run.yaml", "--show-samples", "3"]).stdout
    found_head, text, *_ = printed.splitlines()
    assert found_head == head
    before, after = shown.split(" ... ")
    assert text.strip().startswith(before)
    assert text.strip().endswith(after)
