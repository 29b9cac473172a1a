"""Tests of movekd.student.projector: tokens in the prompt are those that the projector gives."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Idefics3Config,
    InternVLConfig,
    InternVLModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from exports import export
from movekd.errors import ConfigError, WeightsError
from movekd.evaluate.chat import answer
from movekd.student.checkpoint import TrainedStudent, load_student, part_of
from movekd.student.config import StudentConfig
from movekd.student.export.check import check_exports
from movekd.student.export.modeling_movekd import (
    MovekdLlavaConfig,
    MovekdLlavaForConditionalGeneration,
    MovekdPixelShuffle,
)
from movekd.student.export.onnx import encoder_tokens
from movekd.student.projector import prompt_grid
from movekd.student.vlm import build_vlm, image_features, image_token_counter
from small_tower import TOWERS, build_tower

SIDE = {"mlp2x_gelu": 6, "pixel_shuffle": 3}
"""Tokens per side in the prompt, of the 6 x 6 patches of the towers here."""
NEXT_SIZES = [(640, 427), (350, 1100), (90, 40)]
HALF = (0.5, 0.5, 0.5)


def llava(kit, tower, projector, mole=None, **keys):
    """Return the config of a LLaVA around a small tower."""
    keys = {"image_mean": HALF, "image_std": HALF, "prompt": "v1"} | keys
    return StudentConfig(
        vision_tower=str(tower),
        language_model=str(kit.WEIGHTS / "language_model"),
        mole=mole,
        projector_type=projector,
        **keys,
    )


def trained(config, folder, geometry="pad"):
    """Return a student with weights that no projector starts with, in evaluation mode."""
    torch.manual_seed(4)
    student = build_vlm(config)
    with torch.no_grad():
        for name, parameter in student.vlm.named_parameters():
            if "language_model" not in name and "lm_head" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    student.vlm.eval().requires_grad_(False)
    run = {"student": config.model_dump(mode="json"), "data": {"geometry": geometry}}
    return TrainedStudent(student, config.prompt, geometry, folder, run)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Directories of small towers of 6 x 6 patches, and one of LLaVA-NeXT's 336 pixels."""
    folder = tmp_path_factory.mktemp("towers")
    for name in TOWERS:
        build_tower(name, 48).save_pretrained(folder / name)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=336,
        patch_size=84,  # 4 x 4 patches per view
    )
    CLIPVisionModel(config).save_pretrained(folder / "next")
    return folder


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def prompt_ids(student, num_tokens, rows=2):
    """Return a prompt with ``num_tokens`` image tokens, ``rows`` times."""
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    return torch.tensor([[1] + [image] * num_tokens + [7, 36]] * rows)


def shuffle_of(grid, channels, width):
    """Return a projector, its weights away from where LayerNorm and biases start."""
    sizes = {"image_size": 8 * grid, "patch_size": 8}
    vision = CLIPVisionConfig(hidden_size=channels, num_attention_heads=2, **sizes)
    text = LlamaConfig(hidden_size=width, num_attention_heads=2)
    config = MovekdLlavaConfig(vision_config=vision, text_config=text, projector_hidden_act="relu")
    torch.manual_seed(1)
    projector = MovekdPixelShuffle(config)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return projector


def test_it_is_the_projector_of_internvl_and_the_shuffle_of_idefics3():
    projector, grid, channels, width = shuffle_of(6, 10, 12), 6, 10, 12
    patches = torch.randn(2, grid * grid, channels)
    shuffled = projector.shuffle(patches)
    square = patches.view(2, grid, grid, channels)
    internvl = InternVLModel.pixel_shuffle(None, square, 0.5).flatten(1, 2)
    assert torch.equal(shuffled, internvl)
    assert torch.equal(shuffled, Idefics3Connector.pixel_shuffle(None, patches, 2))
    assert Idefics3Config().scale_factor == MovekdPixelShuffle.factor
    config = InternVLConfig(
        vision_config={"hidden_size": channels},
        text_config={"model_type": "llama", "hidden_size": width, "num_attention_heads": 2},
        projector_hidden_act="relu",
    )
    stock = InternVLMultiModalProjector(config)
    stock.load_state_dict(projector.state_dict())
    with torch.no_grad():
        assert torch.equal(projector(patches), stock(internvl))


def test_what_stands_before_the_patches_never_reaches_the_language_model():
    projector = shuffle_of(4, 6, 8)
    patches, prefix = torch.randn(2, 16, 6), torch.randn(2, 5, 6)
    with torch.no_grad():
        assert torch.equal(projector(torch.cat([prefix, patches], 1)), projector(patches))
        with pytest.raises(RuntimeError):  # a patch is missing
            projector(patches[:, 1:])


@pytest.mark.parametrize("projector", SIDE)
@pytest.mark.parametrize("name", sorted(TOWERS))
def test_tokens_in_the_prompt_are_those_of_the_projector(kit, towers, pixels, name, projector):
    config = llava(kit, towers / name, projector)
    student = build_vlm(config)
    student.vlm.eval()
    expected = SIDE[projector] ** 2
    assert (student.grid, student.num_patches) == (6, 36)
    assert student.num_image_tokens == expected == student.vlm.config.image_seq_length
    assert student.count_tokens([48, 90], [48, 30]).tolist() == [expected] * 2
    assert image_token_counter(config)([48], [48]).tolist() == [expected]
    with torch.no_grad():
        output, tokens_BND = image_features(student.vlm, pixels)
        tower = student.vision_tower(pixels, output_hidden_states=True)
        patches = tower.hidden_states[-2][:, TOWERS[name][3] :]
        torch.testing.assert_close(tokens_BND, patches)  # what the KD loss compares
        projected = student.vlm.model.multi_modal_projector(patches)
        torch.testing.assert_close(torch.stack(list(output.pooler_output)), projected)
        assert projected.shape[1] == expected
        given = {"mm_encoder_outputs": {"image": output}}
        logits = student.vlm(input_ids=prompt_ids(student, expected), **given).logits
        assert logits.isfinite().all()
        for wrong in (expected - 1, expected + 1, 45 - expected):  # 45: the other projector's
            with pytest.raises(ValueError, match="Image features and image tokens do not match"):
                student.vlm(input_ids=prompt_ids(student, wrong), **given)


def test_an_odd_grid_is_refused_before_weights_are_read(kit, tmp_path):
    build_tower("siglip", 56).config.save_pretrained(tmp_path / "tower")  # no weights
    config = llava(kit, tmp_path / "tower", "pixel_shuffle")
    said = r"projector_type: pixel_shuffle .* 7 x 7 \(image_size 56, patch_size 8\).*multiple of 2"
    for build in (build_vlm, image_token_counter):
        with pytest.raises(ConfigError, match=said):
            build(config)
    vision = build_tower("siglip", 56).config
    assert prompt_grid("mlp2x_gelu", vision) == 7
    with pytest.raises(ValueError, match="an even grid of patches, not 7"):
        MovekdPixelShuffle(MovekdLlavaConfig(vision_config=vision, text_config=LlamaConfig()))


def test_a_saved_run_is_the_same_model(kit, tmp_path, pixels):
    run = kit.make_run(tmp_path, kit.REVISED, projector_type="pixel_shuffle")
    again = load_student(tmp_path).student
    assert again.num_image_tokens == 9
    given = {"input_ids": prompt_ids(again, 9), "pixel_values": pixels}
    with torch.no_grad():
        assert torch.equal(again.vlm(**given).logits, run.student.vlm(**given).logits)
    names = [n for n, _ in again.vlm.named_parameters() if "multi_modal_projector" in n]
    assert {n.split(".")[-2] for n in names} == {"layer_norm", "linear_1", "linear_2"}
    assert {part_of(name) for name in names} == {"projector"}


@pytest.mark.slow  # tests/student/export/test_check.py has two of them
def test_exports_are_the_run_in_a_fresh_process(kit, towers, tmp_path):
    students = {
        "experts": llava(kit, kit.WEIGHTS / "clip", "pixel_shuffle", kit.OFFICIAL),
        "cls": llava(kit, towers / "dinov2", "pixel_shuffle", prompt="plain"),
        "no cls": llava(kit, towers / "siglip", "pixel_shuffle", prompt="chat_template"),
        "next": llava(
            kit, towers / "next", "pixel_shuffle", kit.REVISED, architecture="llava_next"
        ),
    }
    jobs = []
    for name, config in students.items():
        geometry = "stretch" if name == "next" else "pad"
        run = trained(config, tmp_path / name, geometry)
        for kind in ("hf", "encoder") if name == "experts" else ("hf",):
            export(run, kind, tmp_path / "out" / name / kind)
            jobs.append((run, kind, tmp_path / "out" / name / kind))
    (tmp_path / "scratch").mkdir()
    assert check_exports(jobs, tmp_path / "scratch") == [0.0] * 5


@pytest.fixture(scope="module")
def exported(kit, tmp_path_factory):
    """A run with a pixel shuffle and no experts, and its export."""
    folder = tmp_path_factory.mktemp("exported")
    run = kit.make_run(folder / "run", None, projector_type="pixel_shuffle")
    export(run, "hf", folder / "hf")
    return run, folder / "hf"


def png(size=(90, 60)):
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_export_is_a_student_again(kit, exported, tmp_path):
    run, folder = exported
    again = load_student(folder)
    assert again.student.num_image_tokens == 9
    kit.assert_same_weights(again.student.vlm, run.student.vlm)
    turns = [("human", "<image>\nIs there a 3?")]
    assert answer(again, png(), turns).text == answer(run, png(), turns).text
    export(again, "hf", tmp_path / "two")
    for name in ("config.json", "processor_config.json", "README.md"):
        first, second = ((f / name).read_text() for f in (folder, tmp_path / "two"))
        assert name == "README.md" or first == second
    keys = json.loads((folder / "config.json").read_text())
    assert keys["projector_type"] == "pixel_shuffle"
    assert keys["architectures"] == [MovekdLlavaForConditionalGeneration.__name__]


def test_the_card_says_what_loads_it(exported):
    _, folder = exported
    card = (folder / "README.md").read_text()
    model = MovekdLlavaForConditionalGeneration
    name, module = model.__name__, model.__module__
    assert f"from {module} import {name}\n" in card
    assert f"model = {name}.from_pretrained" in card
    assert "36 tokens of 96 channels" in card
    assert "The projector (pixel_shuffle) makes 9 tokens of a view" in card


def test_the_processor_writes_as_many_tokens_as_the_projector_gives(exported):
    run, folder = exported
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    batch = processor(images=Image.open(io.BytesIO(png())), text="<image>", return_tensors="pt")
    image = run.student.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum() == 9
    assert processor._get_num_multimodal_tokens([(60, 90)])["num_image_tokens"] == [9]


def test_stock_llava_refuses_the_weights(exported):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlavaForConditionalGeneration.from_pretrained(exported[1])


def test_a_projector_of_an_unknown_type_is_refused(exported, tmp_path):
    keys = json.loads((exported[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"projector_type": "resampler"}))
    with pytest.raises(WeightsError, match=r"a model of type 'llava'.*expected an export"):
        load_student(tmp_path)


def test_the_official_format_has_no_such_projector(kit, tmp_path):
    run = kit.make_run(tmp_path / "run", kit.OFFICIAL, projector_type="pixel_shuffle")
    with pytest.raises(ConfigError, match=r"a pixel_shuffle; .*knows only mlp2x_gelu.*--format hf"):
        export(run, "official", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_encoder_does_not_depend_on_the_projector(kit, tmp_path, pixels):
    run = kit.make_run(tmp_path, kit.OFFICIAL, "pretrain", projector_type="pixel_shuffle")
    with torch.no_grad():
        expected = image_features(run.student.vlm, pixels)[1]
        found, _ = encoder_tokens(run)(pixels)  # what format onnx writes
    assert found.shape == (2, 36, 96)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def next_run(kit, towers, tmp_path_factory):
    """A LLaVA-NeXT with a pixel shuffle."""
    config = llava(kit, towers / "next", "pixel_shuffle", architecture="llava_next")
    return trained(config, tmp_path_factory.mktemp("next"), "stretch")


def test_tiles_are_joined_on_the_grid_behind_the_projector(next_run):
    student = next_run.student
    body, transform = student.vlm.model, student.image_transform("stretch")
    for size in NEXT_SIZES:
        seen = transform.see(png(size), student.views)
        pixels_VCHW = torch.from_numpy(seen.pixels_VCHW)
        with torch.no_grad():
            output, tokens_VND = image_features(
                student.vlm, pixels_VCHW, [(seen.height, seen.width)]
            )
            base, *tiles = body.multi_modal_projector(tokens_VND).unflatten(1, (2, 2))
        rows, columns = get_anyres_image_grid_shape(
            (seen.height, seen.width), student.vlm.config.image_grid_pinpoints, 336
        )
        lines = [torch.cat(tiles[r * columns : (r + 1) * columns], 1) for r in range(rows)]
        picture_LHW = unpad_image(torch.cat(lines, 0).permute(2, 0, 1), (seen.height, seen.width))
        newline_LH1 = body.image_newline[:, None, None].expand(-1, picture_LHW.shape[1], 1)
        picture_NL = torch.cat([picture_LHW, newline_LH1], 2).flatten(1).T
        expected = torch.cat([base.flatten(0, 1), picture_NL])
        torch.testing.assert_close(output.pooler_output[0], expected)
        assert student.count_tokens([seen.width], [seen.height]).tolist() == [len(expected)]


def test_a_processor_of_transformers_counts_the_tokens_of_tiles(next_run):
    student, square = next_run.student, {"height": 336, "width": 336}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=square),
        student.tokenizer,
        patch_size=2 * 84,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    widths, heights = np.random.default_rng(0).integers(1, 3000, (2, 200))
    sizes = list(zip(heights.tolist(), widths.tolist(), strict=True))
    expected = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert student.count_tokens(widths, heights).tolist() == expected


def test_a_run_that_is_older_than_the_key_has_llavas_projector(kit, tmp_path):
    run = kit.make_run(tmp_path, None)
    content = json.loads((tmp_path / "model/config.yaml").read_text())
    assert content["student"].pop("projector_type") == "mlp2x_gelu"
    (tmp_path / "model/config.yaml").write_text(json.dumps(content))
    again = load_student(tmp_path).student
    assert type(again.vlm) is LlavaForConditionalGeneration
    assert not hasattr(again.vlm.config, "projector_type")  # its exports stay as they were
    kit.assert_same_weights(again.vlm, run.student.vlm)
