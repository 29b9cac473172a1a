"""Tests of a LLaVA-NeXT as format hf: it answers as the run does, with movekd and without."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaNextForConditionalGeneration,
)

from exports import export
from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.evaluate.generate import generate_answers
from movekd.student.checkpoint import PART_FILES, TrainedStudent, load_student, save_parts
from movekd.student.config import StudentConfig
from movekd.student.vlm import build_vlm

QUESTION = "Is there a 3?"
SIZES = [(640, 427), (350, 1100), (90, 40)]


@pytest.fixture(scope="module")
def folder(kit, tmp_path_factory):
    """A LLaVA-NeXT run with experts, its export, and photographs of three shapes."""
    folder = tmp_path_factory.mktemp("next")
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=336,
        patch_size=84,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    config = StudentConfig(
        architecture="llava_next",
        vision_tower=str(folder / "tower"),
        language_model=str(kit.WEIGHTS / "language_model"),
        mole=kit.REVISED,
        prompt="v1",
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.3, 0.3, 0.2),
    )
    student = build_vlm(config)
    with torch.no_grad():
        for name, parameter in student.vlm.named_parameters():
            if "language_model" not in name and "lm_head" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_parts(folder / "run/model", student.vlm, list(PART_FILES))
    run = {
        "student": config.model_dump(mode="json"),
        "data": {"geometry": "stretch"},
    }
    (folder / "run/model/config.yaml").write_text(json.dumps(run))
    export(load_student(folder / "run"), "hf", folder / "hf")
    photo = Image.fromarray(load_sample_images().images[0])
    for number, size in enumerate(SIZES):
        photo.resize(size).rotate(40 * number).save(folder / f"{number}.png")
    return folder


def answers(trained, folder):
    turns = (("human", f"<image>\n{QUESTION}"),)
    questions = [Conversation(f"{n}", (f"{n}.png",), turns) for n in range(len(SIZES))]
    return list(
        generate_answers(
            trained.student,
            questions,
            lambda name: (folder / name).read_bytes(),
            prompt=trained.prompt,
            geometry=trained.geometry,
            max_new_tokens=6,
        )
    )


def test_the_export_is_read_back(kit, folder):
    run, again = load_student(folder / "run"), load_student(folder / "hf")
    assert again.student.views == "anyres"
    kit.assert_same_weights(again.student.vlm, run.student.vlm)
    expected = answers(run, folder)
    assert len(set(expected)) > 1  # of different images, or it would show nothing
    assert answers(again, folder) == expected


def test_the_processor_makes_the_views_of_the_training(folder):
    student = load_student(folder / "run").student
    transform = student.image_transform("stretch")
    processor = AutoProcessor.from_pretrained(folder / "hf", backend="pil")
    for number, _ in enumerate(SIZES):
        path = folder / f"{number}.png"
        seen = transform.see(path.read_bytes(), "anyres")
        batch = processor(images=Image.open(path), text="<image>", return_tensors="pt")
        found = batch["pixel_values"][0]
        torch.testing.assert_close(found, torch.from_numpy(seen.pixels_VCHW), rtol=0, atol=1e-5)
        image_id = student.tokenizer.convert_tokens_to_ids("<image>")
        num_tokens = student.count_tokens([seen.width], [seen.height])[0]
        assert (batch["input_ids"] == image_id).sum() == num_tokens


REGISTERED = "from movekd.student import register_auto_classes\nregister_auto_classes()"
PROGRAM = """
import sys
{imports}
import torch
torch.set_num_threads(1)
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
directory, question, *images = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(directory, {trust}).eval()
processor = AutoProcessor.from_pretrained(directory, backend="pil")
content = [{{"type": "image"}}, {{"type": "text", "text": question}}]
turns = [{{"role": "user", "content": content}}]
text = processor.apply_chat_template(turns, add_generation_prompt=True)
for image in images:
    given = processor(images=Image.open(image), text=text, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**given, do_sample=False, max_new_tokens=6)
    new = ids[0, given["input_ids"].shape[1]:]
    print(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
"""


@pytest.mark.parametrize(
    ("imports", "trust"),
    [(REGISTERED, ""), ("sys.modules['movekd'] = None", "trust_remote_code=True")],
    ids=["with movekd", "without"],
)
def test_transformers_answers_as_the_run_does(folder, imports, trust):
    images = [str(folder / f"{number}.png") for number, _ in enumerate(SIZES)]
    environment = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = PROGRAM.format(imports=imports, trust=trust)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "hf"), QUESTION, *images],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == answers(load_student(folder / "run"), folder)


def test_the_card_and_the_config_name_the_class(folder):
    LlavaNextForConditionalGeneration.from_pretrained(folder / "hf")
    keys = json.loads((folder / "hf/config.json").read_text())
    assert keys["architectures"] == ["LlavaNextForConditionalGeneration"]
    card = (folder / "hf/README.md").read_text()
    assert "model = LlavaNextForConditionalGeneration.from_pretrained" in card
    assert "up to four tiles" in card


def test_another_geometry_is_refused(folder, tmp_path):
    run = load_student(folder / "run")
    other = TrainedStudent(run.student, run.prompt, "pad", run.directory, run.run)
    with pytest.raises(ConfigError, match=r"geometry 'pad'; the processor of LLaVA-NeXT stretches"):
        export(other, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
