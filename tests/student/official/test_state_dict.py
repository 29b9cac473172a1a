"""Tests of movekd.student.official.state_dict: names and their exact inverse."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import CLIPVisionModel, LlamaConfig

from movekd.errors import ConfigError, WeightsError
from movekd.student import MoleConfig, load_official_state_dict, official_state_dict
from movekd.student.config import StudentConfig
from movekd.student.official.schema import CLIP_L_336, clip_config, skeleton
from movekd.student.official.state_dict import (
    adapters_from_official,
    official_adapters,
    official_views,
    require_official,
)
from movekd.student.parameters import plain_name
from movekd.student.vlm import build_vlm, image_features

# PEFT 0.21 asks transformers 5.23 for a property by its old name; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def student(kit, tmp_path_factory):
    return kit.make_run(tmp_path_factory.mktemp("run"), kit.OFFICIAL).student


def fresh(kit, mole, seed):
    torch.manual_seed(seed)
    weights = {"vision_tower": str(kit.WEIGHTS / "clip")}
    weights["language_model"] = str(kit.WEIGHTS / "language_model")
    return build_vlm(StudentConfig(mole=mole, **weights)).vlm.eval().requires_grad_(False)


@pytest.mark.parametrize("mole", ["OFFICIAL", "REVISED", None])
def test_loading_is_the_exact_inverse(kit, mole):
    mole = mole and getattr(kit, mole)
    one, other = fresh(kit, mole, 1), fresh(kit, mole, 2)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = official_state_dict(one)
    load_official_state_dict(other, state)
    kit.assert_same_weights(one, other)
    again = official_state_dict(other)
    assert list(again) == list(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_a_bare_tower_of_peft_has_the_same_names(kit, student):
    vlm = student.vlm
    blocks = vlm.config.vision_config.num_hidden_layers
    experts = MoleConfig(r=4, lora_alpha=1.0, use_gate=False, layers_to_transform=[*range(blocks)])
    state = {n: t for n, t in official_state_dict(vlm).items() if n.startswith(TOWER)}
    clip = CLIPVisionModel.from_pretrained(kit.WEIGHTS / "clip", dtype=torch.float32)
    tower = get_peft_model(clip, experts)
    assert official_state_dict(tower).keys() == state.keys()
    load_official_state_dict(tower, state)
    again = official_state_dict(tower)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert official_state_dict(tower.get_base_model()).keys() == state.keys()
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        found = tower.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        expected = image_features(vlm, pixels)[1]
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-5, atol=1e-5)
    tower.add_adapter("other", experts)
    with pytest.raises(ConfigError, match="several MoLE adapters"):
        official_state_dict(tower)


def test_what_has_no_official_names_is_refused(kit):
    clip = CLIPVisionModel.from_pretrained(kit.WEIGHTS / "clip", dtype=torch.float32)
    saved = get_peft_model(clip, MoleConfig(r=4, modules_to_save=["post_layernorm"]))
    with pytest.raises(ConfigError, match=r"has modules_to_save, copies of base weights"):
        official_state_dict(saved)
    with pytest.raises(ConfigError, match=r"Linear is neither a LLaVA nor a CLIP vision tower"):
        official_state_dict(torch.nn.Linear(2, 2))


def test_the_state_is_a_copy(student):
    state = official_state_dict(student.vlm)
    name = f"{TOWER}encoder.layers.0.mlp.moe_down.1.lora_A.weight"
    state[name].zero_()
    assert official_state_dict(student.vlm)[name].abs().sum() > 0
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_official_tensors_computed_in_a_plain_loop_give_the_same_tokens(student):
    """The released code's arithmetic, an expert at a time, on its own tensors."""
    state = official_state_dict(student.vlm)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    _, expected_BND = image_features(student.vlm, pixels)

    def linear(x, prefix):
        return F.linear(x, state[f"{prefix}.weight"], state.get(f"{prefix}.bias"))

    def norm(x, prefix):
        return F.layer_norm(x, (96,), state[f"{prefix}.weight"], state[f"{prefix}.bias"], 1e-5)

    def experts(x, base, branch, choice, mlp):
        out = linear(x, base)
        for expert in range(3):
            chosen = choice == expert
            low = linear(x[chosen], f"{mlp}.{branch}.{expert}.lora_A")
            out[chosen] += linear(low, f"{mlp}.{branch}.{expert}.lora_B") / 4
        return out

    kernel = state[f"{TOWER}embeddings.patch_embedding.weight"]
    patches = F.conv2d(pixels, kernel, stride=8).flatten(2).transpose(1, 2)
    cls = state[f"{TOWER}embeddings.class_embedding"].expand(2, 1, -1)
    x = torch.cat([cls, patches], 1) + state[f"{TOWER}embeddings.position_embedding.weight"]
    x = norm(x, f"{TOWER}pre_layrnorm")
    for block in range(5):
        layer = f"{TOWER}encoder.layers.{block}"
        h = norm(x, f"{layer}.layer_norm1")
        q, k, v = (
            linear(h, f"{layer}.self_attn.{part}_proj").unflatten(-1, (4, 24)).transpose(1, 2)
            for part in "qkv"
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{layer}.self_attn.out_proj")
        h, mlp = norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp"
        choice = linear(h, f"{mlp}.router").argmax(-1)
        h = experts(h, f"{mlp}.original_module.fc1", "moe_down", choice, mlp)
        h = h * torch.sigmoid(1.702 * h)
        x = x + experts(h, f"{mlp}.original_module.fc2", "moe_up", choice, mlp)
    torch.testing.assert_close(x[:, 1:], expected_BND, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "hidden", "blocks"), [(4096, 11008, 32), (5120, 13824, 40)], ids=["7b", "13b"]
)
def test_a_full_size_student_has_the_names_and_shapes_of_the_page(kit, width, hidden, blocks):
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        vocab_size=32000,
    )
    mole = kit.OFFICIAL.model_copy(update={"r": 32})
    config = StudentConfig(vision_tower=CLIP_L_336, language_model="none", mole=mole)
    vlm = skeleton(clip_config(CLIP_L_336), text, config)
    plain = {plain_name(name): p.data for name, p in vlm.named_parameters()}
    found = {name: tuple(view.shape) for name, view in official_views(plain).items()}
    sizes = {"D": 1024, "H": 4096, "C": 3, "P": 14, "N": 576, "E": 3, "R": 32, "blocks": 24}
    sizes |= {"T": width, "K": width, "F": hidden, "V": 32000, "text_blocks": blocks}
    assert found == kit.expand(kit.listed(0), sizes)


def test_adapters_come_back_under_our_names(kit):
    shapes = kit.expand(kit.listed(1), {"D": 8, "N": 4, "blocks": 0, "E": 0, "text_blocks": 0})
    official = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours = adapters_from_official(official)
    assert {name.split(".")[0] for name in ours} == {"eva02", "convnext", "sam", "pix2struct"}
    assert ours["sam.tokens.weight"].shape == (4, 4096)
    back = official_adapters(ours)
    assert back.keys() == official.keys()
    assert all(back[name] is official[name] for name in official)
    with pytest.raises(ConfigError, match=r"'eva2' has no official name.*mean 'eva02'"):
        official_adapters({"eva2.channels.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="head of the revised recipe"):
        official_adapters({"sam.hidden.weight": torch.zeros(1)})


def test_what_does_not_fit_is_named_and_nothing_is_copied(student):
    state = official_state_dict(student.vlm)
    name = f"{TOWER}encoder.layers.0.mlp.router.bias"
    cases = {
        rf"1 missing \({name}\)": {n: t for n, t in state.items() if n != name},
        r"1 unexpected \(extra\)": state | {"extra": torch.zeros(1)},
        r"router\.bias is \[4\], expected \[3\]": state | {name: torch.zeros(4)},
        rf"Did you mean '{name}'": {
            n.replace("0.mlp.router.bias", "0.mlp.routers.bias"): t for n, t in state.items()
        },
    }
    for message, content in cases.items():
        zeros = {n: torch.zeros_like(t) for n, t in content.items()}
        with pytest.raises(WeightsError, match=message):
            load_official_state_dict(student.vlm, zeros)
    again = official_state_dict(student.vlm)
    assert all(torch.equal(again[n], tensor) for n, tensor in state.items())


def test_what_the_released_code_would_compute_otherwise_is_refused(kit, student):
    require_official(student.vlm)
    partial = kit.OFFICIAL.model_copy(update={"layers_to_transform": "read"})
    for mole, message in (
        (kit.REVISED, r"multiplied by their gate \(mole\.use_gate\).*--format hf"),
        (partial, r"experts in 5 of 6 blocks"),
        (None, "has no experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_official(fresh(kit, mole, 1))
