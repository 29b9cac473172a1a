"""The YAML of docs/training.md, and commands around it, are ones that `movekd train` takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.train.config import load_config

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
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)
        words = [*words[words.index("movekd") + 1 :], "--dry-run"]
        result = CliRunner().invoke(app, [*words, "--set", "distill.teachers=[clip, sam]"])
        assert result.exit_code == 0, result.output
        assert "stage: pretrain" in result.output
