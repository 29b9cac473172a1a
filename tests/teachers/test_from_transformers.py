"""Vision models out of larger checkpoints, and under the names that they were published with."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, WeightsError
from movekd.teachers import load_teacher
from movekd.teachers.teacher import weights_sha256
from teacher_kit import NORMALISED, Shrink, images


def save(model: Any, path: Path, rename: Callable[[str], str]) -> str:
    """Save a model with some other names for its tensors."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    transformers.utils.logging.enable_progress_bar()
    # save_pretrained may write older names by itself; here they are the caller's business.
    renamed = {rename(name): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def test_siglip_is_found_in_a_whole_checkpoint(tmp_path: Path, shrunken: Shrink) -> None:
    """Published SigLIP 2 is a SiglipModel, text side and all."""
    spec = shrunken("siglip2")
    vision = {key: value for key, value in spec.model_args.items() if key != "model_type"}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 9}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config=vision,
            text_config={**text, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
        )
    )
    path = save(model, tmp_path, lambda name: name)
    assert any(
        name.startswith("vision_model.") for name in load_file(tmp_path / "model.safetensors")
    )
    teacher = load_teacher(spec.with_changes(weights=path))
    assert teacher.weights_sha256 == weights_sha256(model.vision_model)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_dinov3_loads_under_its_older_names(prefix: str, tmp_path: Path, shrunken: Shrink) -> None:
    """Published before transformers 5 moved the blocks from ``layer`` to ``model.layer``."""
    teacher = load_teacher(shrunken("dinov3"))
    path = save(teacher.module, tmp_path, lambda name: re.sub(r"^model\.", prefix, name))
    assert f"{prefix}layer.0.norm1.weight" in load_file(tmp_path / "model.safetensors")
    loaded = load_teacher(shrunken("dinov3", weights=path, seed=1))
    assert loaded.weights_sha256 == teacher.weights_sha256


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("openai/clip-vit-large-patch14-33", "Did you mean 'openai/clip-vit-large-patch14-336'?"),
        ("clip-vit-large-patch14-336", "Did you mean 'openai/clip-vit-large-patch14-336'?"),
        ("google/siglip2-so400m-patch14-348", "Did you mean 'google/siglip2-so400m-patch14-384'?"),
        ("facebook/dinov2-large", ""),  # exists, though no shipped spec has it
    ],
)
def test_a_wrong_hub_id_names_the_nearest_shipped_one(
    model: str, said: str, shrunken: Shrink
) -> None:
    with pytest.raises(WeightsError) as caught:
        load_teacher(shrunken("clip", weights="hub", model=model))
    assert said in str(caught.value)
    assert ("Did you mean" in str(caught.value)) == bool(said)


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, spec = saved_clip(tmp_path)
    assert load_teacher(spec).weights_sha256 == weights_sha256(model.vision_model)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def saved_clip(path: Path) -> tuple[Any, CacheSpec]:
    """Save a whole CLIP, text side and all, and return it with a spec of its image side."""
    side = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        vision_config={**side, "num_hidden_layers": 3, "image_size": 28, "patch_size": 7},
        text_config={
            **side,
            "num_hidden_layers": 1,
            "vocab_size": 9,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )
    model = transformers.CLIPModel(config).eval()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    transformers.utils.logging.enable_progress_bar()
    spec = CacheSpec(
        name="clip",
        provider="transformers",
        model="local/clip",
        weights=str(path),
        image_size=28,
        layer=-2,
        cls=True,
        cls_attention=True,
        **NORMALISED,
    )
    return model, spec


def test_layers_count_as_the_hidden_states_of_transformers(tmp_path: Path) -> None:
    model, spec = saved_clip(tmp_path)
    pixels = images(spec)
    with torch.no_grad():
        vision = model.vision_model(pixels, output_hidden_states=True)
    for layer in (-3, -2, -1, 1, 2, 3):
        output = load_teacher(spec.model_copy(update={"layer": layer}))(pixels)
        hidden = vision.hidden_states[layer]
        assert torch.allclose(output.tokens_BND, hidden[:, 1:], atol=1e-6)
        assert output.cls_BD is not None
        assert torch.allclose(output.cls_BD, hidden[:, 0], atol=1e-6)


def test_config_of_the_checkpoint_must_agree_with_model_args(tmp_path: Path) -> None:
    _, spec = saved_clip(tmp_path)
    agreeing = {"model_type": "clip_vision_model", "hidden_size": 32}
    load_teacher(spec.model_copy(update={"model_args": agreeing}))
    wrong = spec.model_copy(update={"model_args": {"hidden_size": 64}})
    with pytest.raises(WeightsError, match="has hidden_size: 32; model_args of 'clip' ask for 64"):
        load_teacher(wrong)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_layers_that_do_not_exist_are_refused(tmp_path: Path, layer: int) -> None:
    _, spec = saved_clip(tmp_path)
    with pytest.raises(ConfigError, match=rf"layer {layer}; local/clip has 3 blocks"):
        load_teacher(spec.model_copy(update={"layer": layer}))


CONFIGS = {
    "convnextv2": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
    "resnet": {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
    "dinov2_with_registers": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_register_tokens": 3,
        "image_size": 32,
        "patch_size": 8,
    },
    "siglip_vision_model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "sam_vision_model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "global_attn_indexes": [1],
        "image_size": 32,
        "patch_size": 8,
        "window_size": 2,
        "initializer_range": 0.02,
    },
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_other_models_of_transformers_load_from_a_directory(
    model_type: str, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = transformers.AutoModel.from_config(config).eval()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(tmp_path)
    transformers.utils.logging.enable_progress_bar()
    spec = CacheSpec(
        name="other",
        provider="transformers",
        model="local/model",
        weights=str(tmp_path),
        image_size=32,
        layer="last",
        **NORMALISED,
    )
    teacher = load_teacher(spec)
    with torch.no_grad():
        expected = model(images(spec)).last_hidden_state
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    tokens_BND = teacher(images(spec)).tokens_BND
    assert torch.allclose(tokens_BND, expected[:, -tokens_BND.shape[1] :], atol=1e-5)
    assert tokens_BND.shape[1] in (16, 4)
    assert teacher.weights_sha256 == weights_sha256(model)


def test_clip_interpolates_where_the_spec_asks_for_another_size(shrunken: Shrink) -> None:
    spec = shrunken("clip", image_size=84)
    assert load_teacher(spec)(images(spec)).tokens_BND.shape == (2, 36, 32)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path, shrunken: Shrink) -> None:
    with pytest.raises(WeightsError, match=r"not a transformers checkpoint .*save_pretrained"):
        load_teacher(shrunken("clip", weights=str(tmp_path)))
    _, spec = saved_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(WeightsError, match="not a transformers checkpoint"):
        load_teacher(spec)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path, shrunken: Shrink) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(WeightsError, match="not a transformers checkpoint"):
        load_teacher(shrunken("clip", weights=str(tmp_path)))


def test_a_text_model_is_no_teacher(shrunken: Shrink, tmp_path: Path) -> None:
    _, spec = saved_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if "vision" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing \(embeddings\.class_embedding"):
        load_teacher(spec)


def test_a_folder_is_no_name_on_the_hub(tmp_path: Path, shrunken: Shrink) -> None:
    """A stranger's cache may name any folder as its model."""
    for name in (str(tmp_path), "../clip", "./clip"):
        with pytest.raises(WeightsError, match="it is no NAME or OWNER/NAME of the hub"):
            load_teacher(shrunken("clip", model=name, weights="hub"))
