"""`movekd train` accepts the YAML and the commands of docs/training.md."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import TrainingArguments
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


_, AFTER = PAGE.split("\n## The file\n")
FILE, *_ = re.findall(r"^```yaml\n(.*?)^```", AFTER, re.DOTALL | re.MULTILINE)
SECTIONS = {
    heading: blocks
    for heading, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    if (blocks := re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
}
"""Heading -> its YAML blocks."""
CHANGES = [
    pytest.param(block, id=f"{heading} {number}")
    for heading, blocks in SECTIONS.items()
    for number, block in enumerate(blocks)
    if block != FILE
]


@pytest.fixture
def student_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "student.yaml").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "student.yaml"


def merged(content: Any, changes: Any) -> Any:
    """Return a mapping of YAML with the values of another one put in."""
    if isinstance(content, list) and isinstance(changes, list) and len(content) == len(changes):
        return [merged(*pair) for pair in zip(content, changes, strict=True)]
    if not isinstance(content, dict) or not isinstance(changes, dict):
        return changes
    return content | {key: merged(content.get(key), value) for key, value in changes.items()}


@pytest.mark.parametrize("block", CHANGES)
def test_each_change_of_the_file_is_a_run(student_yaml: Path, block: str) -> None:
    """It is accepted, changes what it says, and names arguments that transformers has."""
    whole = load_config(student_yaml)
    changes = yaml.safe_load(block)
    student_yaml.write_text(yaml.safe_dump(merged(yaml.safe_load(FILE), changes)))
    config = load_config(student_yaml)
    assert config != whole
    assert changes.get("training", {}).keys() <= TrainingArguments.__dataclass_fields__.keys()
    content = config.model_dump(mode="json")
    assert merged(content, changes) == content


def test_what_a_user_wants_has_a_section_that_exists() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    assert len(linked) > 8
    assert set(linked) <= anchors


def test_the_memory_of_a_24_gb_gpu_is_computed_as_the_page_says() -> None:
    """From the sizes of CLIP-L/336 and Vicuna-7B; test_readme counts them in real classes."""
    width, mlp, rank, experts, blocks = 1024, 4096, 32, 3, 24
    block = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
    tower = blocks * block + width * (1 + 3 * 14 * 14 + 577) + 4 * width
    expert = 2 * rank * (width + mlp) + 2 * rank + mlp + width
    mole = blocks * (experts * expert + experts * (width + 1))
    hidden, inner, layers, vocabulary = 4096, 11008, 32, 32000
    linear = layers * (4 * hidden**2 + 3 * hidden * inner)
    language_model = linear + 2 * vocabulary * hidden + (2 * layers + 1) * hidden
    assert language_model == 6_738_415_616  # as Llama 2 7B's card says
    projector = width * hidden + hidden + hidden**2 + hidden
    everything = tower + mole + projector + language_model

    lora = layers * 128 * (4 * 2 * hidden + 3 * (hidden + inner))
    saved_in_4bit = linear * (2 - (0.5 + 1 / 64 + 4 / (64 * 256)))

    def gib(weights: int, learning: int, size: int = 2, more: float = 0) -> str:
        return f"{(size * (weights + 3 * learning) + more) / 2**30:.1f}"

    rows = re.findall(r"^\| (`stage.*?) \| \w+ \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert dict(rows) == {
        "`stage: distill`: experts, no language model": gib(tower + mole, mole, 4),
        "`stage: pretrain`: experts, projector, tower": gib(everything, mole + projector + tower),
        "`stage: pretrain`: experts and projector": gib(everything, mole + projector),
        "`stage: finetune`: experts, projector, LoRA": gib(
            everything, mole + projector, more=16 * lora
        ),
        "`stage: finetune`: the same, `load_in_4bit`": gib(
            everything, mole + projector, more=16 * lora - saved_in_4bit
        ),
        "`stage: finetune`: everything": gib(everything, everything),
    }


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
    assert len(lines) == 9
    for line in lines:
        words = shlex.split(line)
        words = [*words[words.index("movekd") + 1 :], "--dry-run"]
        result = CliRunner().invoke(app, [*words, "--set", "distill.teachers=[clip, sam]"])
        assert result.exit_code == 0, result.output
        assert "stage: pretrain" in result.output


def test_the_tokens_of_the_page_are_those_that_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
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
