"""Every pipeline runs from start to end: its README's commands and its YAML, with small models.

``conftest.run`` says what is replaced.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModel
from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.student import register_auto_classes
from movekd.student.checkpoint import load_student
from pipeline_readme import PIPELINES, check_run, commands


@pytest.mark.parametrize(
    ("pipeline", "teachers"),
    [
        ("llava15_v1.0", ["clip", "eva02", "convnext"]),
        ("llava15_v1.1", ["clip", "eva02", "convnext", "sam"]),
        ("llava_next", ["clip", "eva02", "convnext"]),
    ],
)
def test_both_stages(run: Any, pipeline: str, teachers: list[str]) -> None:
    words = commands(pipeline)
    assert [w[w.index("movekd") + 1] for w in words] == ["shards", "cache", "train"] * 2
    for command in words:
        run(command)
    for stage in ("pretrain", "finetune"):
        check_run(Path("runs") / stage, teachers, has_text=True)
        given = yaml.safe_load((PIPELINES / pipeline / f"{stage}.yaml").read_text())
        assert given["distill"]["teachers"] == teachers
    trained = load_student(Path("runs/finetune"))
    assert (trained.student.views == "anyres") is (pipeline == "llava_next")
    ask = ["ask", "runs/finetune", "playground/data/3.png", "Is there a 3?"]
    result = CliRunner().invoke(app, [*ask, "--max-new-tokens", "3", "--device", "cpu"])
    assert result.exit_code == 0, result.output


def test_the_official_recipe_in_llava_next_as_the_readme_says(run: Any) -> None:
    for command in commands("llava_next")[:6]:
        words = list(command)
        if "build" in words:  # the teachers' own grids
            at = words.index("--grid")
            del words[at : at + 2]
        run([*words, "--set", "recipe=official"] if "train" in words else words)
    for stage in ("pretrain", "finetune"):
        check_run(Path("runs") / stage, ["clip", "eva02", "convnext"], has_text=True)
        config = yaml.safe_load(Path(f"runs/{stage}/config.yaml").read_text())
        assert config["recipe"] == "official"
        assert config["distill"]["adapters"] == "teacher"


def test_tiles_are_distilled_as_the_readme_says(run: Any) -> None:
    pack, build, train = commands("llava_next")[:3]
    at = build.index("--resize-mode")
    run(pack)
    run([*build[:at], "--tiles", "anyres", *build[at + 2 :]])
    run([*train, "--set", "distill.views=all"])
    check_run(Path("runs/pretrain"), ["clip", "eva02", "convnext"], has_text=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of the exporter's own packages
def test_the_encoder_alone_and_a_pretrain_from_it(run: Any) -> None:
    for command in commands("llava15_v1.0")[:2]:
        run(command)  # data/pretrain and cache/pretrain
    words = commands("distill_only")
    assert len(words) == 6
    for command in words:
        run(command)
    register_auto_classes()
    assert AutoModel.from_pretrained("my-encoder").config.model_type == "movekd_clip_vision"
    assert Path("my-encoder-onnx/encoder.onnx").exists()
    check_run(Path("runs/distill"), ["clip", "eva02", "convnext"], has_text=False)
    check_run(Path("runs/pretrain"), ["clip", "eva02", "convnext"], has_text=True)
