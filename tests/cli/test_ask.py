"""Tests of `movekd ask`, `export` and `import`: one model in every form answers alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from typer.testing import CliRunner

import scenes
from movekd.cli.main import app
from movekd.errors import ConfigError, UnreadableImageError
from movekd.student.checkpoint import PART_FILES, save_parts
from movekd.student.config import MoleKeys, StudentConfig
from movekd.student.vlm import build_vlm

WEIGHTS = Path(scenes.__file__).parent / "weights"


def run(*words, stdin=None):
    """Run a command in this process; return what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finetuned run of the official recipe, its exports, one of them imported, and an image."""
    folder = tmp_path_factory.mktemp("models")
    scenes.write_corpus(folder, num_pretrain=1, num_finetune=1, num_val=1, num_test=1)
    for prompt in ("chat_template", "plain", "v1"):
        config = StudentConfig(
            vision_tower=str(WEIGHTS / "clip"),
            language_model=str(WEIGHTS / "language_model"),
            mole=MoleKeys(
                r=4,
                lora_alpha=1,
                use_gate=False,
                init_lora_weights="kaiming",
                layers_to_transform="all",
            ),
            prompt=prompt,
        )
        torch.manual_seed(5)
        student = build_vlm(config)
        model = folder / prompt / "model"
        save_parts(model, student.vlm, list(PART_FILES))
        student.tokenizer.save_pretrained(model)
        keys = {
            "recipe": "official",
            "stage": "finetune",
            "student": config.model_dump(mode="json"),
            "data": {"geometry": "crop"},
        }
        (model / "config.yaml").write_text(json.dumps(keys))
    run("export", folder / "chat_template", "--format", "hf", "--output", folder / "hf")
    unchecked = "--no-check"  # takes seconds; the first export and tests/student have it
    run("export", folder / "v1", "--format", "hf", "--output", folder / "hf_v1", unchecked)
    run("export", folder / "v1", "--format", "official", "--output", folder / "official", unchecked)
    tower = ("--vision-tower", WEIGHTS / "clip")
    run("import", folder / "official", *tower, "--output", folder / "imported")
    return folder


def test_every_form_of_a_model_answers_alike(folder):
    image = folder / "images/test_00000.png"
    words = [image, "Is there a 3?", "--max-new-tokens", 6]
    answers = {form: run("ask", folder / form, *words) for form in ("chat_template", "hf")}
    assert answers["hf"] == answers["chat_template"]
    assert answers["hf"].strip()
    answers = {form: run("ask", folder / form, *words) for form in ("v1", "hf_v1", "imported")}
    assert answers["imported"] == answers["v1"] == answers["hf_v1"]
    assert answers["imported"].strip()


def test_a_chat_keeps_image_and_turns(folder):
    image = folder / "images/test_00000.png"
    words = ["ask", folder / "chat_template", image, "--chat", "--json", "--max-new-tokens", 4]
    printed = run(*words, stdin="Is there a 3?\nWhat is the sum?\n\nnot asked\n")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["question"] for line in lines] == ["Is there a 3?", "What is the sum?"]
    first = run("ask", folder / "chat_template", image, "Is there a 3?", "--max-new-tokens", 4)
    assert lines[0]["answer"] == first.strip()
    again = run(*words[:3], "Is there a 3?", *words[3:], stdin="What is the sum?\n")  # ends by EOF
    assert again == printed
    assert run(*words, stdin="") == ""


def test_what_cannot_be_asked_is_a_sentence(folder):
    image = folder / "images/test_00000.png"
    with pytest.raises(ConfigError, match=r"is an address; .*Download it, and give the file"):
        run("ask", folder / "hf", "https://example.com/cat.jpg", "Is there a 3?")
    with pytest.raises(ConfigError, match=r"none\.png does not exist.* Give an image file"):
        run("ask", folder / "none", folder / "none.png", "Is there a 3?")
    with pytest.raises(ConfigError, match=r"(Is a directory|no regular file).* Give an image file"):
        run("ask", folder / "none", folder, "Is there a 3?")
    with pytest.raises(UnreadableImageError, match="no image that can be read"):
        run("ask", folder / "none", folder / "test.json", "Is there a 3?")
    with pytest.raises(ConfigError, match="the question is missing"):
        run("ask", folder / "hf", image)
    with pytest.raises(ConfigError, match="holds only an image and its"):
        run("ask", folder / "plain", image, "--chat", stdin="a\n")
    with pytest.raises(ConfigError, match=r"tokens; the language model holds 256"):
        run("ask", folder / "hf", image, "Is there a 3? " * 200)
    with pytest.raises(ConfigError, match=r"--format is 'hff'.*Did you mean 'hf'"):
        run("export", folder / "hf", "--format", "hff", "--output", folder / "x")


def test_tiles_of_a_llava_next_are_counted(tmp_path):
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=56,
    )
    CLIPVisionModel(tower).save_pretrained(tmp_path / "tower")
    config = StudentConfig(
        architecture="llava_next",
        vision_tower=str(tmp_path / "tower"),
        language_model=str(WEIGHTS / "language_model"),
        mole=None,
        prompt="v1",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
    student = build_vlm(config)
    save_parts(tmp_path / "model", student.vlm, list(PART_FILES))
    keys = {"student": config.model_dump(mode="json"), "data": {"geometry": "stretch"}}
    (tmp_path / "model/config.yaml").write_text(json.dumps(keys))
    Image.new("RGB", (640, 640)).save(tmp_path / "a.png")
    num_tokens = 36 + 12 * 12 + 12  # a view, four tiles, a line end behind each row
    assert student.count_tokens([640], [640]).tolist() == [num_tokens]
    words = ["ask", tmp_path, tmp_path / "a.png"]
    assert run(*words, "Is there a 3?", "--max-new-tokens", 2).strip()
    asked = "Is there a 3? " * 12  # with one view's 36 tokens it would fit
    with pytest.raises(ConfigError, match=r"conversation are 2(6|7|8)\d tokens; .* holds 256"):
        run(*words, asked)


def test_json_of_export_and_import(folder, tmp_path):
    words = ["export", folder / "v1", "--format", "official", "--output", tmp_path / "o", "--json"]
    said = json.loads(run(*words, "--no-check"))
    assert said["check"] == "not compared with the run (--no-check)"
    assert {"config.json", "model.safetensors", "README.md"} <= set(said["files"])
    assert said["random"] == []
    tower = ("--vision-tower", WEIGHTS / "clip")
    said = json.loads(run("import", tmp_path / "o", *tower, "--output", tmp_path / "i", "--json"))
    assert (said["stage"], said["dtype"], said["adapters"]) == (2, "float32", [])


def test_neither_command_deletes_what_it_reads(folder, snapshot):
    before = snapshot(folder)
    run_, official = folder / "v1", folder / "official"
    for words in (
        ["export", run_, "--format", "encoder", "--output", run_],
        ["export", run_, "--format", "encoder", "--output", run_ / "encoder"],
        ["export", run_ / "model", "--format", "encoder", "--output", run_],
        ["import", official, "--output", official],
        ["import", official, "--tokenizer", folder / "hf", "--output", folder / "hf"],
    ):
        with pytest.raises(ConfigError, match="which is read"):
            run(*words, "--overwrite")
    assert snapshot(folder) == before


def test_a_refusal_is_one_sentence_and_exit_code_2(folder, tmp_path):
    words = ["-m", "movekd", "import", folder / "images", "--output", tmp_path / "x"]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("movekd: ")
    assert not (tmp_path / "x").exists()
