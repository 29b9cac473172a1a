"""Every pipeline runs end to end: the commands of its README and its YAML, with small models.

Paths, recipes, teachers and flags are those that ship. Replaced are the models (random weights, the
shipped teachers' own code), the data, the number of steps, and torchrun.
"""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenes
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import CLIPVisionConfig, CLIPVisionModel
from typer.testing import CliRunner

from movekd.cli.main import app
from movekd.resources import resource_dir
from movekd.student.files import load_student

PIPELINES = resource_dir("pipelines")
LANGUAGE_MODEL = Path(scenes.__file__).parent / "weights/language_model"
SIZES = [(60, 40), (40, 60), (50, 50), (90, 30)]


def commands(pipeline: str) -> list[list[str]]:
    """Return the commands of a pipeline's README, in order, as words."""
    text = (PIPELINES / pipeline / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    ((?:movekd|torchrun) .*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, shrunken: Callable[..., Any]) -> Path:
    """Two towers, ``student`` like the small clip teacher and ``tiles`` of 336 pixels; specs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    for name, image_size, patch_size in (("student", 56, 14), ("tiles", 336, 84)):
        tower = CLIPVisionConfig(
            **small, num_hidden_layers=3, image_size=image_size, patch_size=patch_size
        )
        CLIPVisionModel(tower).save_pretrained(folder / name)
        normalisation = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(normalisation))
    for teacher in ("clip", "eva02", "convnext", "sam"):
        content = shrunken(teacher).model_dump(mode="json")
        (folder / f"{teacher}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], None]:
    """A folder with the data that a README expects, and a function that runs its commands there."""
    photo = Image.fromarray(load_sample_images().images[0])
    names = {
        "blip_laion_cc_sbu_558k.json": "LLaVA-Pretrain",
        "llava_v1_5_mix665k.json": "playground/data",
    }
    for file, folder in names.items():
        (tmp_path / folder).mkdir(parents=True)
        entries = []
        for number, size in enumerate(SIZES):
            photo.rotate(20 * number).resize(size).save(tmp_path / folder / f"{number}.png")
            turns = [
                {"from": "human", "value": "<image>\nIs there a 3?"},
                {"from": "gpt", "value": "yes"},
            ]
            entries.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns})
        (tmp_path / file).write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> None:
        words = words[words.index("movekd") + 1 :]
        changed = {
            name: str(models / f"{name}.yaml") for name in ("clip", "eva02", "convnext", "sam")
        }
        words = [changed.get(word, word) for word in words]
        words = [str(PIPELINES.parent / w) if w.startswith("pipelines/") else w for w in words]
        if words[0] == "train":
            tower = "tiles" if "llava_next" in " ".join(words) else "student"
            for override in (
                f"student.vision_tower={models / tower}",
                f"student.language_model={LANGUAGE_MODEL}",
                "training.per_device_train_batch_size=2",
                "training.max_steps=2",
                "training.logging_steps=1",
                "training.bf16=false",
                "training.use_cpu=true",
                "training.dataloader_num_workers=0",
                "training.report_to=none",
            ):
                words += ["--set", override]
            words.append("--allow-random-teachers")
        elif words[:2] == ["cache", "build"]:
            words += ["--num-workers", "0", "--device", "cpu"]
        result = CliRunner().invoke(app, words)
        if result.exception is not None:
            raise result.exception

    return run


def check_run(output: Path, teachers: list[str], *, has_text: bool) -> None:
    """Two steps, every term a number, a file for each part."""
    log = json.loads((output / "log.json").read_text())
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    terms = {"loss_kd", "loss_balance", "token_std", *(f"loss_kd_{t}" for t in teachers)}
    for step in steps:
        assert terms <= step.keys()
        assert ("loss_text" in step) is has_text
        assert all(math.isfinite(value) for value in step.values())
        assert all(step[f"loss_kd_{teacher}"] > 0 for teacher in teachers)
    files = {path.name for path in (output / "model").glob("*.safetensors")}
    assert {"mole_encoder.safetensors", "encoder_adapter.safetensors"} <= files
    assert ("mm_projector.safetensors" in files) is has_text


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


def test_tiles_are_distilled_as_the_readme_says(run: Any) -> None:
    pack, build, train = commands("llava_next")[:3]
    at = build.index("--geometry")
    run(pack)
    run([*build[:at], "--views", "anyres", *build[at + 2 :]])
    run([*train, "--set", "distill.views=all"])
    check_run(Path("runs/pretrain"), ["clip", "eva02", "convnext"], has_text=True)


def test_the_encoder_alone_and_a_pretrain_from_it(run: Any) -> None:
    for command in commands("llava15_v1.0")[:2]:
        run(command)  # data/pretrain and cache/pretrain
    words = commands("distill_only")
    assert len(words) == 4
    for command in words:
        run(command)
    check_run(Path("runs/distill"), ["clip", "eva02", "convnext"], has_text=False)
    check_run(Path("runs/pretrain"), ["clip", "eva02", "convnext"], has_text=True)
