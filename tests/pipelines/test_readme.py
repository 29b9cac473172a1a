"""README's commands for the reader's own images, run from top to bottom with small models.

``conftest.run`` says what is replaced.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return README's `movekd` commands in order, as words."""
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^    (movekd .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_both_stages_are_trained_and_the_last_is_exported(run: Any) -> None:
    Path("images").symlink_to("LLaVA-Pretrain")
    Path("captions.json").symlink_to("blip_laion_cc_sbu_558k.json")
    Path("chats.json").symlink_to("blip_laion_cc_sbu_558k.json")
    assert [words[1] for words in commands()] == [
        *("shards", "cache", "cache", "train", "train", "export")
    ]
    for words in commands():
        if words[1:3] == ["cache", "plan"]:
            words += ["--num-images", "558000", "--assume-rate", "100", "--no-measure-disk"]
        run(words)
    inputs = json.loads(Path("runs/finetune/inputs.json").read_text())
    assert {"clip", "eva02"} <= set(re.findall(r"\w+", json.dumps(inputs)))
    assert AutoModelForImageTextToText.from_pretrained("my-model").config.model_type == "llava"
