"""Tests of movekd.student.vlm: the student at step 0, and where its experts are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

import scenes
from movekd.errors import ConfigError, WeightsError
from movekd.student.config import MoleKeys, StudentConfig
from movekd.student.vlm import build_encoder, build_vlm, image_features, mole_config
from small_tower import TOWERS, build_tower

WEIGHTS = Path(scenes.__file__).parent / "weights"
REVISED = MoleKeys(
    r=4, lora_alpha=4.0, use_gate=True, init_lora_weights="zero", layers_to_transform="read"
)
OFFICIAL = MoleKeys(
    r=4, lora_alpha=1.0, use_gate=False, init_lora_weights="kaiming", layers_to_transform="all"
)


def config(mole=REVISED, **keys):
    paths = {
        "vision_tower": str(WEIGHTS / "clip"),
        "language_model": str(WEIGHTS / "language_model"),
    }
    return StudentConfig(mole=mole, **(paths | keys))


@pytest.fixture(scope="module")
def pixels_BCHW():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def clip_tokens(pixels_BCHW, layer=-2):
    clip = CLIPVisionModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32).eval()
    with torch.no_grad():
        return clip(pixels_BCHW, output_hidden_states=True).hidden_states[layer][:, 1:]


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("mole", [None, REVISED])
def test_the_revised_student_is_clip_at_step_0(pixels_BCHW, mole, layer):
    student = build_vlm(config(mole, vision_feature_layer=layer))
    student.vlm.eval()
    with torch.no_grad():
        _, found_BND = image_features(student.vlm, pixels_BCHW)
    torch.testing.assert_close(found_BND, clip_tokens(pixels_BCHW, layer), rtol=1e-5, atol=1e-5)


def test_the_official_student_is_not_clip_at_step_0(pixels_BCHW):
    student = build_vlm(config(OFFICIAL))
    student.vlm.eval()
    with torch.no_grad():
        _, found_BND = image_features(student.vlm, pixels_BCHW)
    assert not torch.allclose(found_BND, clip_tokens(pixels_BCHW), atol=1e-3)


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_encoder_alone_is_the_tower_inside(pixels_BCHW, layer):
    keys = config(OFFICIAL, vision_feature_layer=layer)
    torch.manual_seed(1)
    whole = build_vlm(keys)
    alone = build_encoder(keys.model_copy(update={"language_model": None}))
    inside = dict(whole.vlm.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.vlm.named_parameters():
            assert parameter.requires_grad
            parameter.copy_(inside[name])  # of the same name and shape
        assert alone.vlm.eval().dtype == torch.float32
        _, expected_BND = image_features(whole.vlm.eval(), pixels_BCHW)
        _, found_BND = image_features(alone.vlm, pixels_BCHW)
    assert torch.equal(found_BND, expected_BND)
    assert len(list(alone.vlm.parameters())) == len(list(whole.vision_tower.parameters()))
    assert (alone.image_size, alone.grid, alone.width) == (48, 6, 96)
    assert alone.image_mean == whole.image_mean


def test_an_encoder_does_not_talk():
    with pytest.raises(ConfigError, match=r"language_model is null.*stage: pretrain as init_from"):
        build_vlm(config(language_model=None))


def test_experts_end_at_the_layer_that_is_read_unless_official():
    for mole, layer, blocks in ((REVISED, -2, 5), (REVISED, -3, 4), (OFFICIAL, -2, 6)):
        names = [
            name
            for name, _ in build_vlm(
                config(mole, vision_feature_layer=layer)
            ).vlm.named_parameters()
            if ".mole_" in name
        ]
        assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == set(range(blocks))


def test_projected_tokens_go_where_transformers_puts_them(pixels_BCHW):
    student = build_vlm(config())
    student.vlm.eval()
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    input_ids = torch.tensor([[1] + [image] * student.num_image_tokens + [7, 36]] * 2)
    with torch.no_grad():
        output, _ = image_features(student.vlm, pixels_BCHW)
        ours = student.vlm(input_ids=input_ids, mm_encoder_outputs={"image": output}).logits
        theirs = student.vlm(input_ids=input_ids, pixel_values=pixels_BCHW).logits
    torch.testing.assert_close(ours, theirs)


def test_the_language_model_is_unchanged():
    student = build_vlm(config())
    base = AutoModelForCausalLM.from_pretrained(
        WEIGHTS / "language_model", dtype=torch.float32
    ).eval()
    student.vlm.eval()
    input_ids = torch.tensor([[1, 5, 20, 30, 6]])
    with torch.no_grad():
        torch.testing.assert_close(
            student.vlm(input_ids=input_ids).logits, base(input_ids=input_ids).logits
        )
    assert student.vlm.lm_head.weight is not student.vlm.get_input_embeddings().weight


def test_what_it_says_of_itself_is_the_towers():
    student = build_vlm(config())
    assert (student.image_size, student.grid, student.num_image_tokens, student.width) == (
        48,
        6,
        36,
        96,
    )
    assert student.image_mean == pytest.approx((0.26, 0.26, 0.26))
    transform = student.image_transform("pad")
    assert (transform.image_size, transform.geometry, transform.std) == (
        48,
        "pad",
        student.image_std,
    )
    given = build_vlm(config(image_mean=(0, 0, 0), image_std=(1, 1, 1)))
    assert given.image_std == (1, 1, 1)


def test_a_tokenizer_without_an_image_token_gets_one(tmp_path):
    shutil.copytree(WEIGHTS / "language_model", tmp_path / "lm")
    path = tmp_path / "lm/tokenizer.json"
    path.write_text(path.read_text().replace('"<image>"', '"<picture>"'))
    path = tmp_path / "lm/tokenizer_config.json"
    path.write_text(path.read_text().replace('"<image>"', '"<picture>"'))
    size = len(AutoTokenizer.from_pretrained(tmp_path / "lm"))
    student = build_vlm(config(language_model=str(tmp_path / "lm")))
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    assert image == size == student.vlm.config.image_token_id
    assert student.vlm.get_input_embeddings().num_embeddings == size + 1
    assert student.vlm.lm_head.out_features == size + 1


def test_what_cannot_be_loaded_is_named(tmp_path):
    for key in ("vision_tower", "language_model"):
        with pytest.raises(WeightsError, match=rf"student\.{key} '.*nowhere' cannot be loaded"):
            build_vlm(config(**{key: str(tmp_path / "nowhere")}))


def test_a_tower_without_mean_and_std_says_which_keys_to_give(tmp_path):
    shutil.copytree(WEIGHTS / "clip", tmp_path / "clip")
    (tmp_path / "clip/preprocessor_config.json").write_text('{"do_resize": true}')
    with pytest.raises(ConfigError, match=r"give student\.image_mean and image_std"):
        build_vlm(config(vision_tower=str(tmp_path / "clip")))


@pytest.mark.parametrize("name", sorted(TOWERS.keys() - {"clip"}))
def test_towers_without_cls_or_with_registers_hand_on_their_patches(pixels_BCHW, tmp_path, name):
    num_prefix = TOWERS[name][3]
    tower = build_tower(name, 48).eval()
    tower.save_pretrained(tmp_path)
    mean = (0.5, 0.5, 0.5)
    student = build_vlm(config(vision_tower=str(tmp_path), image_mean=mean, image_std=mean))
    student.vlm.eval()
    with torch.no_grad():
        expected = tower(pixels_BCHW, output_hidden_states=True).hidden_states[-2][:, num_prefix:]
        output, found_BND = image_features(student.vlm, pixels_BCHW)
        stock = LlavaMultiModalProjector(student.vlm.config)
        stock.load_state_dict(student.vlm.model.multi_modal_projector.state_dict())
        projected = stock(expected)
        image = student.tokenizer.convert_tokens_to_ids("<image>")
        input_ids = torch.tensor([[1] + [image] * student.num_image_tokens + [7, 36]] * 2)
        logits = student.vlm(input_ids=input_ids, mm_encoder_outputs={"image": output}).logits
    assert found_BND.shape == (2, 36, 16)
    torch.testing.assert_close(found_BND, expected)
    torch.testing.assert_close(torch.stack(list(output.pooler_output)), projected)
    assert logits.isfinite().all()
    experts = [n for n, _ in student.vlm.named_parameters() if ".mole_router" in n]
    assert len(experts) == 4  # weight and bias, in the two blocks before the layer that is read


def test_a_tower_of_another_kind_is_refused(tmp_path):
    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"vision_tower is a 'vit'; expected one of clip_vision"):
        build_vlm(config(vision_tower=str(tmp_path)))


CODE = """
open({mark!r}, "w").close()
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
class Config(CLIPVisionConfig):
    model_type = "theirs"
class Model(CLIPVisionModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder, original, **changes):
    """Copy a directory, add code that leaves a mark, and change JSON files; return the copy."""
    shutil.copytree(original, folder)
    (folder / "theirs.py").write_text(CODE.format(mark=str(folder / "was_run")))
    for file, keys in changes.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


OF_MODEL = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
OF_TOKENIZER = {"AutoTokenizer": [None, "theirs.Tokenizer"]}


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision_tower", {"config": {"model_type": "theirs", "auto_map": OF_MODEL}}),
        ("language_model", {"config": {"model_type": "theirs", "auto_map": OF_MODEL}}),
        (
            "language_model",
            {"tokenizer_config": {"tokenizer_class": "Theirs", "auto_map": OF_TOKENIZER}},
        ),
    ],
)
def test_code_of_a_directory_is_never_run_nor_asked_about(tmp_path, monkeypatch, part, changes):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("standard input was read"))
    name = {"vision_tower": "clip"}.get(part, part)
    folder = with_code(tmp_path / "theirs", WEIGHTS / name, **changes)
    with pytest.raises(WeightsError, match=rf"student\.{part} '.*theirs'"):
        build_vlm(config(**{part: str(folder)}))
    assert not (folder / "was_run").exists()


def test_code_is_refused_by_name_and_a_stock_class_goes_before_it(tmp_path):
    keys = {"model_type": "theirs", "auto_map": OF_MODEL}
    folder = with_code(tmp_path / "theirs", WEIGHTS / "clip", config=keys)
    with pytest.raises(WeightsError, match=r"brings its own Python code \(auto_map\), which"):
        build_encoder(config(vision_tower=str(folder)))
    stock = with_code(tmp_path / "stock", WEIGHTS / "clip", config={"auto_map": OF_MODEL})
    tower = build_encoder(config(None, vision_tower=str(stock))).vision_tower
    assert type(tower) is CLIPVisionModel
    assert not (stock / "was_run").exists()


def test_a_bin_file_is_tensors_or_a_refusal(tmp_path):
    class Program:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    folder = shutil.copytree(WEIGHTS / "clip", tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    tower = build_encoder(config(None, vision_tower=str(folder))).vision_tower
    expected = build_encoder(config(None)).vision_tower.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in tower.state_dict().items())
    torch.save(state | {"x": Program()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"vision_tower .* cannot be loaded: Weights only load"):
        build_encoder(config(vision_tower=str(folder)))
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [("all", [0, 1, 2]), ("read", [0, 1]), (None, [0, 1]), ([2, 0], [2, 0])],
)
def test_layers_to_transform_names_the_blocks_with_experts(blocks, expected):
    config = StudentConfig(vision_tower="t", mole=MoleKeys(layers_to_transform=blocks))
    assert mole_config(config, 3).layers_to_transform == expected


@pytest.mark.parametrize("block", [3, -1])
def test_a_block_that_the_tower_does_not_have_is_refused(block):
    config = StudentConfig(vision_tower="t", mole=MoleKeys(layers_to_transform=[0, block]))
    with pytest.raises(ConfigError, match=rf"names block {block}; .* 3 blocks, 0 to 2"):
        mole_config(config, 3)
