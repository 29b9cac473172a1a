"""The commands of a pipeline's README, and what a run of two steps must leave."""

import json
import math
import re
import shlex
from pathlib import Path

from movekd.resources import resource_dir

PIPELINES = resource_dir("pipelines")


def commands(pipeline: str) -> list[list[str]]:
    """Return the commands of a pipeline's README, in order, as words."""
    text = (PIPELINES / pipeline / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    ((?:movekd|torchrun) .*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def check_run(output: Path, teachers: list[str], *, has_text: bool, has_mole: bool = True) -> None:
    """Two steps, every term a number, a file for each part."""
    log = json.loads((output / "log.json").read_text())
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    terms = {"loss_kd", "token_std", *(f"loss_kd_{t}" for t in teachers)}
    terms |= {"loss_balance"} if has_mole else set()
    for step in steps:
        assert terms <= step.keys()
        assert ("loss_text" in step) is has_text
        assert all(math.isfinite(value) for value in step.values())
        assert all(step[f"loss_kd_{teacher}"] > 0 for teacher in teachers)
    files = {path.name for path in (output / "model").glob("*.safetensors")}
    assert "encoder_adapter.safetensors" in files
    assert ("mole_encoder.safetensors" in files) is has_mole
    assert ("mm_projector.safetensors" in files) is has_text
