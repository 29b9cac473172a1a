"""Tests of movekd.student.export.hugging_face: what stock transformers loads is the student."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

from exports import export
from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError, WeightsError
from movekd.student import register_auto_classes
from movekd.student.checkpoint import TrainedStudent, load_student
from movekd.student.config import StudentConfig
from movekd.student.export.load_again import load_onnx
from movekd.student.export.onnx import encoder_tokens
from movekd.student.tokenization import tokenize_question
from movekd.student.towers import EXPORTED_TYPES
from movekd.student.vlm import build_vlm, image_features
from small_tower import TOWERS, build_tower


def test_transformers_loads_the_whole_model(kit, trained, tmp_path, text_and_image):
    register_auto_classes()
    export(trained, "hf", tmp_path / "out")
    vlm = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    given = text_and_image(trained.student)
    with torch.no_grad():
        expected = trained.student.vlm(**given).logits
        torch.testing.assert_close(vlm(**given).logits, expected, rtol=1e-5, atol=1e-5)
    kit.assert_same_weights(vlm, trained.student.vlm)


def test_an_export_is_a_student_again_and_can_be_exported(kit, trained, tmp_path):
    export(trained, "hf", tmp_path / "one")
    keys = json.loads((tmp_path / "one/config.json").read_text())
    assert not keys["tie_word_embeddings"]  # the head was trained by itself
    assert str(kit.WEIGHTS) not in str(keys)
    again = load_student(tmp_path / "one")
    assert (again.prompt, again.geometry) == (trained.prompt, trained.geometry)
    assert again.student.image_std == trained.student.image_std
    kit.assert_same_weights(again.student.vlm, trained.student.vlm)
    export(again, "hf", tmp_path / "two")
    kit.assert_same_weights(load_student(tmp_path / "two").student.vlm, trained.student.vlm)
    first, second = ((tmp_path / n / "config.json").read_text() for n in ("one", "two"))
    assert first == second


@pytest.mark.parametrize("geometry", ["crop", "pad", "stretch"])
def test_the_processor_makes_the_pixels_of_the_training(official, tmp_path, geometry):
    trained = TrainedStudent(
        official.student, official.prompt, geometry, official.directory, official.run
    )
    export(trained, "hf", tmp_path / "out")
    photo = load_sample_images().images[0][:301, :507]
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    expected = torch.from_numpy(trained.student.image_transform(geometry)(path.read_bytes()))
    for backend, atol in (("pil", 1e-6), ("torchvision", 0.2)):
        processor = AutoProcessor.from_pretrained(tmp_path / "out", backend=backend)
        found = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("end", ["</s>", 'the"end'])
def test_the_chat_template_writes_what_the_training_read(official, tmp_path, end):
    tokenizer = copy.deepcopy(official.student.tokenizer)
    tokenizer.add_special_tokens({"eos_token": end})
    student = replace(official.student, tokenizer=tokenizer)
    trained = TrainedStudent(student, "v1", "crop", official.directory, official.run)
    export(trained, "hf", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    turns = (("human", "<image>\nWhat is it?"), ("gpt", "A bus."), ("human", "And that?"))
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
            {"role": "user", "content": "And that?"},
        ],
        add_generation_prompt=True,
    )
    conversation = Conversation("c", ("image",), turns)
    expected = tokenize_question(
        conversation, trained.student.tokenizer, prompt="v1", num_image_tokens=1
    )
    assert f"A bus.{end}USER:" in text
    assert trained.student.tokenizer(text)["input_ids"] == expected
    encoded = processor(images=Image.new("RGB", (60, 40)), text=text, return_tensors="pt")
    long = tokenize_question(
        conversation, trained.student.tokenizer, prompt="v1", num_image_tokens=36
    )
    assert encoded["input_ids"][0].tolist() == long


def test_an_exported_encoder_is_an_auto_model(trained, tmp_path, pixels):
    register_auto_classes()
    export(trained, "encoder", tmp_path / "out")
    encoder = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = image_features(trained.student.vlm, pixels)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.crop_size["height"] == 48
    with pytest.raises(WeightsError, match=r"only a vision encoder|of type 'clip_vision_model'"):
        load_student(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")  # those of the exporter's own packages
@pytest.mark.parametrize("mole", ["REVISED", None])
def test_an_encoder_of_stage_distill_is_exported(kit, tmp_path, pixels, mole):
    run = kit.make_encoder_run(tmp_path / "run", mole and getattr(kit, mole))
    trained = load_student(run, takes_encoder=True)
    with torch.no_grad():
        expected = image_features(trained.student.vlm, pixels)[1]
    export(trained, "encoder", tmp_path / "out")
    encoder = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.5] * 3
    card = (tmp_path / "out/README.md").read_text()
    assert "A vision encoder: it" in card
    assert "language model started from | none" in card
    assert "Prompt" not in card
    with torch.no_grad():
        tokens_BND, _ = encoder_tokens(trained)(pixels)
    torch.testing.assert_close(tokens_BND, expected, rtol=1e-5, atol=1e-5)
    for kind in ("hf", "official"):
        with pytest.raises(ConfigError, match=rf"--format {kind} writes both.*encoder or onnx"):
            export(trained, kind, tmp_path / kind)
        assert not (tmp_path / kind).exists()
    with pytest.raises(ConfigError, match="stage: distill"):
        load_student(run)
    if mole:
        export(trained, "onnx", tmp_path / "onnx")
        given = {"pixel_values": pixels}
        found, _ = load_onnx({"directory": str(tmp_path / "onnx")}, given)
        torch.testing.assert_close(found["tokens"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "mole"), [("dinov2 with registers", "REVISED"), ("dinov3", None)])
def test_registers_are_no_patches_in_an_export(kit, tmp_path, text_and_image, name, mole):
    build_tower(name, 48).save_pretrained(tmp_path / "tower")
    mean = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    student = build_vlm(
        StudentConfig(
            vision_tower=str(tmp_path / "tower"),
            language_model=str(kit.WEIGHTS / "language_model"),
            mole=mole and getattr(kit, mole),
            **mean,
        )
    )
    student.vlm.eval()
    given = text_and_image(student)  # a token per patch
    with torch.no_grad():
        expected = student.vlm(**given).logits
    trained = TrainedStudent(student, "v1", "crop", tmp_path / "run", {})
    export(trained, "hf", tmp_path / "out")
    again = load_student(tmp_path / "out").student
    with torch.no_grad():
        assert torch.equal(again.vlm(**given).logits, expected)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    encoded = processor(images=Image.new("RGB", (60, 40)), text="<image>", return_tensors="pt")
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    assert (encoded["input_ids"] == image).sum() == student.num_image_tokens == 36
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        stock(**given)  # it takes [CLS] and registers for patches
    card = (tmp_path / "out/README.md").read_text()
    assert "modeling_movekd import MovekdLlavaForConditionalGeneration" in card


def test_a_geometry_without_a_processor_is_refused(official, tmp_path):
    trained = TrainedStudent(
        official.student, official.prompt, "longest_side", official.directory, official.run
    )
    with pytest.raises(ConfigError, match="geometry 'longest_side'"):
        export(trained, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(TOWERS))
@pytest.mark.parametrize("mole", ["REVISED", "OFFICIAL", None])
def test_no_tower_loses_its_experts(kit, tmp_path, pixels, name, mole):
    build_tower(name, 48).save_pretrained(tmp_path / "tower")
    keys = mole and getattr(kit, mole)
    run = kit.make_encoder_run(tmp_path / "run", keys, tmp_path / "tower")
    trained = load_student(run, takes_encoder=True)
    export(trained, "encoder", tmp_path / "out")
    register_auto_classes()
    encoder, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        hidden_states = encoder(pixels, output_hidden_states=True).hidden_states
        expected = image_features(trained.student.vlm, pixels)[1]
    assert torch.equal(hidden_states[-2][:, TOWERS[name][3] :], expected)


def test_experts_in_a_tower_without_a_class_are_refused(kit, tmp_path, monkeypatch):
    build_tower("siglip", 48).save_pretrained(tmp_path / "tower")
    run = kit.make_encoder_run(tmp_path / "run", kit.REVISED, tmp_path / "tower")
    trained = load_student(run, takes_encoder=True)
    monkeypatch.delitem(EXPORTED_TYPES, "siglip_vision_model")  # as after `register_tower`
    with pytest.raises(ConfigError, match=r"experts stand in a tower of type 'siglip"):
        export(trained, "encoder", tmp_path / "out")
    assert not (tmp_path / "out").exists()
