"""Run the commands of the pipelines' READMEs with small models, few images and two steps.

Paths, recipes, teachers and flags are the shipped ones. Models, data, number of steps, devices and
torchrun are replaced.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import CLIPVisionConfig, CLIPVisionModel
from typer.testing import CliRunner

import scenes
from movekd.cli.main import app
from movekd.resources import resource_dir

PIPELINES = resource_dir("pipelines")
LANGUAGE_MODEL = Path(scenes.__file__).parent / "weights/language_model"
SIZES = [(60, 40), (40, 60), (50, 50), (90, 30)]


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
) -> Callable[[list[str]], str]:
    """Make a folder with the data of a README; return a function that runs its commands there."""
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

    def run(words: list[str]) -> str:
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
        elif words[0] == "evaluate":
            words += ["--device", "cpu", "--max-new-tokens", "3"]
        elif words[0] == "import":  # where the release names a hub id
            words += ["--vision-tower", str(models / "student")]
        result = CliRunner().invoke(app, words)
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return run
