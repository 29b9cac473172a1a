"""Models of timm, and of open_clip."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError
from movekd.teachers import load_teacher
from movekd.teachers.teacher import weights_sha256
from teacher_kit import NORMALISED, Shrink, images


@pytest.mark.parametrize(
    ("model", "model_args"),
    [
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
        ),
        (
            "eva02_tiny_patch14_224",
            {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2},
        ),
    ],
)
def test_small_timm_models_load_from_float16(
    model: str, model_args: dict[str, Any], tmp_path: Path
) -> None:
    network = timm.create_model(model, num_classes=0, **model_args).half().float().eval()
    state = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    spec = CacheSpec(
        name="small",
        provider="timm",
        model=model,
        weights=str(tmp_path),
        model_args={**model_args, "num_classes": 0},
        image_size=model_args["img_size"],
        layer=-2,
        cls=True,
        cls_attention=True,
        **NORMALISED,
    )
    teacher = load_teacher(spec)
    assert next(teacher.parameters()).dtype == torch.float32
    assert teacher.weights_sha256 == weights_sha256(network)
    with torch.no_grad():
        (wanted,) = network.forward_intermediates(
            images(spec), indices=[1], output_fmt="NLC", intermediates_only=True
        )
        final = network.forward_features(images(spec))[:, network.num_prefix_tokens :]
    assert torch.allclose(teacher(images(spec)).tokens_BND, wanted, atol=1e-5)
    changes = {"layer": "last", "cls_attention": False}
    last = load_teacher(spec.model_copy(update=changes))(images(spec))
    assert torch.allclose(last.tokens_BND, final, atol=1e-5)


def test_convnext_is_found_in_a_whole_open_clip_checkpoint(
    shrunken: Shrink, tmp_path: Path
) -> None:
    teacher = load_teacher(shrunken("convnext"))
    state = {f"visual.trunk.{k}": v.clone() for k, v in teacher.module.state_dict().items()}
    state |= {"logit_scale": torch.ones(1), "visual.trunk.head.norm.weight": torch.ones(24)}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    loaded = load_teacher(shrunken("convnext", weights=str(tmp_path), seed=1))
    assert loaded.weights_sha256 == teacher.weights_sha256


@pytest.mark.parametrize(
    "extra",
    [
        {"pretrained": True},
        {"checkpoint_path": "x.pth"},
        {"cache_dir": "/tmp", "pretrained_cfg_overlay": {"url": "file:///x"}},
    ],
)
@pytest.mark.parametrize("name", ["eva02_clip", "convnext"])
def test_model_args_cannot_fetch_or_write_files(name, extra, shrunken: Shrink) -> None:
    spec = shrunken(name)
    changed = spec.model_copy(update={"model_args": {**spec.model_args, **extra}})
    with pytest.raises(ConfigError, match=rf"hold {sorted(extra)[0]}.*under `weights`"):
        load_teacher(changed)
