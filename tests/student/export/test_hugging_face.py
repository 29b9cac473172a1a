"""Tests of movekd.student.export: exports as a stranger loads them, with movekd and without."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from sklearn.datasets import load_sample_images
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError, WeightsError
from movekd.student.checkpoint import TrainedStudent, load_student
from movekd.student.config import StudentConfig
from movekd.student.export.formats import export
from movekd.student.export.model_card import model_card, random_parts
from movekd.student.export.onnx import encoder_tokens
from movekd.student.tokenization import tokenize_question
from movekd.student.vlm import build_vlm, image_features

STUDENTS = {"official": "OFFICIAL", "revised": "REVISED", "plain": None}


@pytest.fixture(scope="module", params=STUDENTS)
def trained(kit, request, tmp_path_factory):
    name = STUDENTS[request.param]
    return kit.make_run(tmp_path_factory.mktemp("run"), name and getattr(kit, name))


@pytest.fixture(scope="module")
def official(kit, tmp_path_factory):
    return kit.make_run(tmp_path_factory.mktemp("run"), kit.OFFICIAL)


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def inputs(student, pixels):
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[1] + [image] * student.num_image_tokens + [7, 30]] * len(pixels))
    return {"input_ids": ids, "pixel_values": pixels}


def test_transformers_loads_the_whole_model(kit, trained, tmp_path, pixels):
    export(trained, "hf", tmp_path / "out")
    vlm = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    given = inputs(trained.student, pixels)
    with torch.no_grad():
        expected = trained.student.vlm(**given).logits
        torch.testing.assert_close(vlm(**given).logits, expected, rtol=1e-5, atol=1e-5)
    kit.assert_same_weights(vlm, trained.student.vlm)


def test_an_export_is_a_student_again_and_can_be_exported(kit, trained, tmp_path):
    export(trained, "hf", tmp_path / "one")
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
    from PIL import Image

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
    from PIL import Image

    encoded = processor(images=Image.new("RGB", (60, 40)), text=text, return_tensors="pt")
    long = tokenize_question(
        conversation, trained.student.tokenizer, prompt="v1", num_image_tokens=36
    )
    assert encoded["input_ids"][0].tolist() == long


def test_the_encoder_alone_is_an_auto_model(trained, tmp_path, pixels):
    export(trained, "encoder", tmp_path / "out")
    encoder = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = image_features(trained.student.vlm, pixels)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.crop_size["height"] == 48
    with pytest.raises(WeightsError, match=r"encoder alone|of type 'clip_vision_model'"):
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
        assert "onnxruntime agrees" in export(trained, "onnx", tmp_path / "onnx")


TOWERS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 48}, 0),
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}, 1),
    "dinov2 with registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "num_register_tokens": 4},
        5,
    ),
}


@pytest.mark.filterwarnings("ignore")  # those of the exporter's own packages
@pytest.mark.parametrize("name", TOWERS)
def test_other_towers_are_onnx_too(kit, tmp_path, pixels, name):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model_class, config_class, keys, num_prefix = TOWERS[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower = model_class(config_class(image_size=48, patch_size=8, **sizes, **keys))
    tower.save_pretrained(tmp_path / "tower")
    run = kit.make_encoder_run(tmp_path / "run", None, tmp_path / "tower")
    trained = load_student(run, takes_encoder=True)
    assert "onnxruntime agrees" in export(trained, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/encoder.onnx"))
    tokens, *cls = session.run(None, {"pixel_values": pixels.numpy()})
    assert len(cls) == min(num_prefix, 1)
    with torch.no_grad():
        expected = image_features(trained.student.vlm, pixels)[1]
    torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=1e-4, atol=1e-4)
    export(trained, "encoder", tmp_path / "encoder")
    card = (tmp_path / "encoder/README.md").read_text()
    assert f"hidden_states[-2][:, {num_prefix}:]" in card
    kind = {"siglip": "SigLIP", "dinov2": "DINOv2"}.get(name, "DINOv2 with registers")
    assert f"it is a {kind} without experts" in card


def test_registers_do_not_go_into_a_llava_of_transformers(kit, tmp_path):
    config = Dinov2WithRegistersConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=8
    )
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "tower")
    mean = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    student = build_vlm(
        StudentConfig(
            vision_tower=str(tmp_path / "tower"),
            language_model=str(kit.WEIGHTS / "language_model"),
            mole=None,
            **mean,
        )
    )
    trained = TrainedStudent(student, "v1", "crop", tmp_path / "run", {})
    with pytest.raises(ConfigError, match=r"with registers.*Use --format encoder or onnx"):
        export(trained, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def python(program, folder, *arguments):
    """Run a program in a fresh interpreter without a network."""
    environment = os.environ | {
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_MOVEKD = """
import sys
sys.modules["movekd"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
whole, encoder, given = sys.argv[1:]
given = torch.load(given, weights_only=True)
try:
    AutoModelForImageTextToText.from_pretrained(whole, trust_remote_code=False)
except ValueError as error:
    print("refused", str(error)[:30])
model = AutoModelForImageTextToText.from_pretrained(whole, trust_remote_code=True).eval()
alone = AutoModel.from_pretrained(encoder, trust_remote_code=True).eval()
AutoProcessor.from_pretrained(whole)
with torch.no_grad():
    logits = model(**given["inputs"]).logits
    tokens = alone(given["inputs"]["pixel_values"], output_hidden_states=True).hidden_states[-2]
torch.testing.assert_close(logits, given["logits"], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(tokens[:, 1:], given["tokens"], rtol=1e-5, atol=1e-5)
assert not [name for name in sys.modules if name.startswith("movekd.")]
print("equal")
"""


def test_an_export_runs_where_movekd_is_not_installed(official, tmp_path, pixels):
    export(official, "hf", tmp_path / "whole")
    export(official, "encoder", tmp_path / "encoder")
    given = inputs(official.student, pixels)
    with torch.no_grad():
        logits = official.student.vlm(**given).logits
        tokens = image_features(official.student.vlm, pixels)[1]
    content = {"inputs": given, "logits": logits, "tokens": tokens.clone()}
    torch.save(content, tmp_path / "given.pt")
    printed = python(
        WITHOUT_MOVEKD, tmp_path, tmp_path / "whole", tmp_path / "encoder", tmp_path / "given.pt"
    )
    assert printed.splitlines()[-1] == "equal"
    assert "refused" in printed  # without the user's word, nothing runs


@pytest.mark.parametrize(
    "imports",
    [
        "import movekd\nfrom transformers import LlavaForConditionalGeneration, AutoProcessor",
        "from transformers import LlavaForConditionalGeneration, AutoProcessor\nimport movekd",
        "import transformers.models.clip.modeling_clip\nimport movekd\n"
        "from transformers import LlavaForConditionalGeneration, AutoProcessor",
        "import movekd, transformers.modeling_layers\n"
        "from transformers import LlavaForConditionalGeneration, AutoProcessor",
    ],
    ids=["movekd first", "transformers first", "clip first", "layers later"],
)
def test_importing_movekd_is_enough_in_any_order(official, tmp_path, imports):
    export(official, "hf", tmp_path / "out")
    program = (
        f"import sys\n{imports}\n"
        "model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])\n"
        "AutoProcessor.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.vision_tower).__module__)"
    )
    printed = python(program, tmp_path, tmp_path / "out")
    assert printed.strip() == "movekd.student.export.modeling_movekd"


def test_the_written_encoder_ends_at_the_hidden_state_that_is_read(trained, pixels):
    encoder = encoder_tokens(trained)
    assert len(encoder.blocks) == 5
    with torch.no_grad():
        tokens_BND, cls_BD = encoder(pixels)
        output, expected_BND = image_features(trained.student.vlm, pixels)
    torch.testing.assert_close(tokens_BND, expected_BND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cls_BD, output.hidden_states[-2][:, 0], rtol=1e-5, atol=1e-5)


def test_the_encoder_is_one_graph_with_a_free_batch(official, pixels):
    encoder = encoder_tokens(official)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(encoder, (pixels,), dynamic_shapes={"pixel_values": batch})
    again = torch.randn(5, 3, 48, 48)
    torch.testing.assert_close(program.module()(again), encoder(again), rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_says_what_to_install(official, tmp_path, monkeypatch):
    monkeypatch.setattr("movekd.student.export.onnx.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx, .*pip install 'movekd\[onnx\]'"):
        export(official, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # those of the exporter's own packages
def test_onnxruntime_computes_the_same_tokens(trained, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    said = export(trained, "onnx", tmp_path / "out")
    assert "onnxruntime agrees" in said
    assert (tmp_path / "out/encoder.onnx").exists()


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


def test_weights_that_never_learned_are_marked(kit, official, tmp_path):
    assert random_parts(official.student.vlm) == []
    source = kit.write_released(tmp_path)
    state = kit.released_state()
    from safetensors.torch import save_file

    from movekd.student.official.import_checkpoint import import_official

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


def test_a_geometry_without_a_processor_is_refused(official, tmp_path):
    trained = TrainedStudent(
        official.student, official.prompt, "longest_side", official.directory, official.run
    )
    with pytest.raises(ConfigError, match="geometry 'longest_side'"):
        export(trained, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_llava_is_no_export(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(WeightsError, match=r"no movekd\.json.*--format hf"):
        load_student(tmp_path)
