"""Tests of movekd.student.export.model_card."""

from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from exports import export
from movekd.student.checkpoint import load_student
from movekd.student.export.model_card import model_card, random_parts
from movekd.student.official.import_checkpoint import import_official


@pytest.mark.parametrize("kind", ["hf", "encoder", "official"])
def test_every_export_has_a_card(official, tmp_path, kind):
    export(official, kind, tmp_path / "my-model")
    text = (tmp_path / "my-model/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "other"
    for part in ("# my-model", "3 LoRA experts of rank 4", "recipe | official", "clip, eva02"):
        assert part in body, part
    assert "Apache-2.0" in body
    assert "Random weights" not in body
    assert str(official.directory) not in text
    assert "DIR" not in body


@pytest.mark.parametrize("prompt", ["v1", "chat_template", "plain"])
def test_the_card_shows_the_prompt(official, prompt):
    trained = replace(official, prompt=prompt)
    section = model_card(trained, "hf", "x").split("## Prompt\n")[1].split("\n## ")[0]
    assert f"Format `{prompt}`" in section
    if prompt == "v1":
        assert (
            "answers to the user's questions. USER: <image>\nWhat is in the image? ASS" in section
        )
        assert "The tokenizer puts `<s>` in front" in section
    assert ("```text" in section) == (prompt != "plain")


def test_weights_that_never_learned_are_marked(kit, official, tmp_path):
    assert random_parts(official.student.vlm) == []
    source = kit.write_released(tmp_path)
    state = kit.released_state()
    state = {n: torch.ones_like(t) if "norm" in n else t for n, t in state.items()}
    save_file(state, source / "model.safetensors")
    import_official(source, tmp_path / "in")
    trained = load_student(tmp_path / "in")
    assert random_parts(trained.student.vlm) == ["vision tower", "language model"]
    card = model_card(trained, "hf", "x")
    assert "**Random weights.** The vision tower and the language model" in card
    assert "imported from | released" in card
    assert "teachers | clip, convnext, eva02" in card
    assert "base/" not in card
    export(trained, "hf", tmp_path / "hf")
    again = model_card(load_student(tmp_path / "hf"), "hf", "x")
    assert again == card
    assert str(tmp_path) not in (tmp_path / "hf/movekd.json").read_text()
