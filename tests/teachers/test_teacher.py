"""One contract for every shipped teacher, and loading from what was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from movekd.cache.spec import load_spec, shipped_specs
from movekd.errors import ConfigError, WeightsError
from movekd.teachers import Teacher, TeacherOutput, load_teacher
from movekd.teachers.providers import build_backbone
from movekd.teachers.teacher import weights_sha256
from teacher_kit import Shrink, images

TOKENS = {
    "clip": (16, 32),
    "eva02": (64, 32),
    "eva02_clip": (16, 32),
    "convnext": (4, 24),
    "sam": (64, 16),
    "pix2struct": (1024, 32),
    "siglip2": (16, 32),
    "dinov2": (16, 32),
    "dinov3": (16, 32),
    "radio": (16, 32),
}
"""Shipped spec -> (N, D) of its shrunken configuration; a new spec needs its line."""


def equal(one: TeacherOutput, other: TeacherOutput) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a is b is None or (a is not None and torch.equal(a, b)) for a, b in pairs)


@pytest.fixture(params=sorted(shipped_specs()))
def shipped(request: pytest.FixtureRequest, shrunken: Shrink) -> Teacher:
    return load_teacher(shrunken(request.param))


def test_output_has_the_promised_shapes(shipped: Teacher) -> None:
    spec = shipped.spec
    output = shipped(images(spec))
    num_tokens, width = TOKENS[spec.name]
    assert output.tokens_BND.shape == (2, num_tokens, width)
    assert round(num_tokens**0.5) ** 2 == num_tokens
    assert output.tokens_BND.std() > 0.01
    assert (output.cls_BD is not None) == spec.cls
    assert (output.cls_attention_BHN is not None) == spec.cls_attention
    if output.cls_BD is not None:
        assert output.cls_BD.shape == (2, width)
    if output.cls_attention_BHN is not None:
        assert output.cls_attention_BHN.shape == (2, 4, num_tokens)
        assert (output.cls_attention_BHN > 0).all()
        mass_BH = output.cls_attention_BHN.sum(dim=-1)
        if spec.cls_source == "token":
            assert (mass_BH < 1).all()
        else:
            assert torch.allclose(mass_BH, torch.ones_like(mass_BH))
    for tensor in (value for value in vars(output).values() if value is not None):
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_is_frozen_and_in_evaluation_mode(shipped: Teacher) -> None:
    assert not any(module.training for module in shipped.module.modules())
    assert not any(parameter.requires_grad for parameter in shipped.parameters())
    assert shipped(images(shipped.spec)).tokens_BND.is_inference()


def test_the_same_spec_gives_the_same_teacher(shipped: Teacher) -> None:
    pixels = images(shipped.spec)
    before = torch.random.get_rng_state()
    again = load_teacher(shipped.spec)
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.weights_sha256 == shipped.weights_sha256
    assert equal(again(pixels), shipped(pixels))
    other = load_teacher(shipped.spec.model_copy(update={"seed": 1}))
    assert other.weights_sha256 != shipped.weights_sha256


def test_an_image_does_not_depend_on_its_batch(shipped: Teacher) -> None:
    pixels = images(shipped.spec, batch=3)
    together, alone = shipped(pixels), shipped(pixels[1:2])
    for a, b in zip(vars(together).values(), vars(alone).values(), strict=True):
        assert a is b is None or torch.allclose(a[1:2], b, atol=1e-4)


def test_runs_in_bfloat16_and_hashes_in_float32(shipped: Teacher) -> None:
    half = load_teacher(shipped.spec, dtype=torch.bfloat16)
    pixels = images(shipped.spec)
    exact, rounded = shipped(pixels).tokens_BND, half(pixels).tokens_BND
    assert half.weights_sha256 == shipped.weights_sha256
    assert next(half.module.parameters()).dtype == torch.bfloat16
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_rotary_frequencies_stay_exact_in_bfloat16(shrunken: Shrink) -> None:
    """As transformers keeps them when it loads a model in bfloat16."""
    exact = load_teacher(shrunken("dinov3"))
    half = load_teacher(shrunken("dinov3"), dtype=torch.bfloat16)
    found = {name: b for name, b in half.module.named_buffers() if "inv_freq" in name}
    assert found
    for name, frequencies in found.items():
        assert torch.equal(frequencies, exact.module.get_buffer(name))


def test_hash_follows_every_weight(shipped: Teacher) -> None:
    assert weights_sha256(shipped.module) == shipped.weights_sha256
    name, parameter = list(shipped.module.named_parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
    assert weights_sha256(shipped.module) != shipped.weights_sha256, name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_saved_teacher_loads_from_its_file(shipped: Teacher, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    state = {name: tensor.clone() for name, tensor in shipped.module.state_dict().items()}
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    # Another seed: weights that were not read would differ.
    loaded = load_teacher(shipped.spec.model_copy(update={"weights": str(path), "seed": 1}))
    assert loaded.weights_sha256 == shipped.weights_sha256
    # A file that is written over in place must not change a teacher that was read from it.
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert weights_sha256(loaded.module) == shipped.weights_sha256
    assert equal(loaded(images(shipped.spec)), shipped(images(shipped.spec)))
    # PyTorch's own allocations are aligned to 64 bytes; views of a mapped file to 8.
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}


@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
def test_only_the_whole_state_dict_is_taken(shipped: Teacher, tmp_path: Path, change: str) -> None:
    state = {name: tensor.clone() for name, tensor in shipped.module.state_dict().items()}
    name = next(n for n, t in state.items() if "embed" not in n and t.ndim == 2)
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        name = "surplus.weight"
        state[name] = torch.ones(2)
    else:
        state[name] = torch.ones(3, 5)
    save_file(state, tmp_path / "model.safetensors")
    spec = shipped.spec.model_copy(update={"weights": str(tmp_path / "model.safetensors")})
    with pytest.raises(WeightsError, match=rf"does not fit .*{name}"):
        load_teacher(spec)


def test_unreachable_weights_say_what_to_fetch(shrunken: Shrink) -> None:
    files = {
        "clip": r"config\.json with model\.safetensors .*openai/clip-vit-large-patch14-336",
        "eva02": r"eva02_L_coco_det_sys_o365\.pth .*Yuxin-CV/EVA-02",
        "eva02_clip": r"model\.safetensors .*timm/eva02_large_patch14_clip_336\.merged2b",
        "convnext": r"open_clip_model\.safetensors .*laion/CLIP-convnext_xxlarge",
        "sam": r"model\.safetensors .*facebook/sam-vit-large",
        "pix2struct": r"config\.json with model\.safetensors .*google/pix2struct-large",
        "siglip2": r"config\.json with model\.safetensors .*google/siglip2-so400m-patch14-384",
        "dinov2": r"config\.json with .*facebook/dinov2-with-registers-large",
        "dinov3": r"config\.json with .*facebook/dinov3-vitl16-pretrain-lvd1689m",
        "radio": r"model\.safetensors .*timm/vit_large_patch16_radio_v3\.c_radio",
    }
    assert sorted(files) == sorted(shipped_specs())
    for name, said in files.items():
        with pytest.raises(WeightsError, match=rf"{said}.* set `weights: DIRECTORY`"):
            load_teacher(shrunken(name, weights="hub"))


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "radio", "eva02_clip"])
def test_last_reads_attention_in_the_last_block(name: str, shrunken: Shrink) -> None:
    """The tokens are those after the final norm, where there is one; the block is the same."""
    spec = shrunken(name, layer="last")
    last, block = load_teacher(spec), load_teacher(spec.with_changes(layer=-1))
    with_norm, without = last(images(spec)), block(images(spec))
    assert with_norm.cls_attention_BHN is not None
    assert without.cls_attention_BHN is not None
    assert torch.equal(with_norm.cls_attention_BHN, without.cls_attention_BHN)
    assert torch.equal(with_norm.tokens_BND, without.tokens_BND) == (name == "radio")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("eva02_clip", {"model": "eva02_large_patch14_clip_33"}, "Did you mean 'eva02_large_patch"),
        ("convnext", {"model": "convnext_xxlarg"}, "Did you mean 'convnext_xxlarge'"),
        ("convnext", {"model": "ViT-B-32"}, "has no timm backbone"),
        ("eva02", {"model": "eva02_dett"}, "Did you mean 'eva02_det'"),
        ("eva02", {"model_args": {"dept": 3}}, "make no eva02_det: .*'dept'"),
        ("eva02_clip", {"model_args": {"dept": 3}}, "make no eva02_large.*'dept'"),
        ("clip", {"model_args": {}}, "have no model_type"),
        ("clip", {"model_args": {"model_type": "clip_vision_modl"}}, "mean 'clip_vision_model'"),
        (
            "clip",
            {"model_args": {"model_type": "clip_vision_model", "hidden_sise": 4}},
            "unknown key 'hidden_sise' .*Did you mean 'hidden_size'",
        ),
        (
            "clip",
            {"model_args": {"model_type": "clip_vision_model", "hidden_size": "4"}},
            "make no clip_vision_model: .*expected int, got str",
        ),
        ("clip", {"layer": "neck", "cls_attention": False}, "layer: neck; .* has none"),
        ("sam", {"cls": True}, r"has no \[CLS\] token"),
        ("convnext", {"layer": -2}, "has no blocks to count. Set layer to last"),
    ],
)
def test_wrong_specs_are_refused_with_the_way_out(
    name: str, changes: dict[str, Any], said: str, shrunken: Shrink
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_teacher(shrunken(name, **changes))


@pytest.mark.parametrize("name", ["sam", "eva02_clip"])
def test_pixels_of_another_size_are_refused(name: str, shrunken: Shrink) -> None:
    teacher = load_teacher(shrunken(name))
    with pytest.raises(ConfigError, match=r"does not take 70x70 pixels: .*Set image_size"):
        teacher(torch.zeros(1, 3, 70, 70))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("clip", 304),
        ("eva02", 304),
        ("eva02_clip", 304),
        ("convnext", 843),
        ("sam", 308),
        ("pix2struct", 513),
        ("siglip2", 428),
        ("dinov2", 304),
        ("dinov3", 303),
        ("radio", 304),
    ],
)
def test_published_architectures_have_their_published_size(name: str, millions: int) -> None:
    spec = load_spec(name).model_copy(update={"weights": "random"})
    with torch.device("meta"):
        module = build_backbone(spec).module
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=1.5)


def test_what_the_compiler_says_is_a_sentence(shrunken: Shrink, monkeypatch) -> None:
    teacher = load_teacher(shrunken("clip"))

    def broken(function, **_options):
        def run(_pixels):
            raise RuntimeError("no C++ compiler\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    teacher.compile_forward()
    with pytest.raises(ConfigError, match=r"compiled \(RuntimeError: no C\+\+ compiler\)"):
        teacher(images(teacher.spec))


def test_every_shipped_file_names_its_revision_and_what_stands_for_cls() -> None:
    for path in shipped_specs().values():
        text = path.read_text()
        assert "\nrevision: " in text, path
        assert "[CLS]" in text.split("\nname: ")[0], path
