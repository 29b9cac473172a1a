"""Pix2Struct against the image processor and the model of transformers, on a photograph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.datasets import load_sample_images
from torch import Tensor

from movekd.cache.spec import CacheSpec
from movekd.corpus.transforms import ImageTransform
from movekd.errors import ConfigError
from movekd.teachers import load_teacher
from movekd.teachers.pix2struct import patches_of
from movekd.teachers.teacher import weights_sha256

Shrink = Callable[..., CacheSpec]


@pytest.fixture(scope="module")
def photo_HWC() -> np.ndarray[Any, Any]:
    """A square of a photograph, 8-bit levels, 192 pixels a side."""
    return load_sample_images().images[0][100:292, 200:392].copy()


@pytest.fixture
def pixels_BCHW(photo_HWC: np.ndarray[Any, Any], tmp_path: Path, shrunken: Shrink) -> Tensor:
    """The same as the spec's own transform gives it to the teacher."""
    from PIL import Image

    Image.fromarray(photo_HWC).save(tmp_path / "photo.png")
    spec = shrunken("pix2struct", image_size=192)
    transform = ImageTransform(
        spec.image_size, "crop", spec.resample, spec.mean, spec.std, spec.fill
    )
    return torch.from_numpy(transform((tmp_path / "photo.png").read_bytes()))[None]


def processed(photo_HWC: np.ndarray[Any, Any], side: int) -> dict[str, Tensor]:
    """What the library's processor makes of it: flattened_patches and attention_mask."""
    processor = transformers.Pix2StructImageProcessor(
        max_patches=2048, patch_size={"height": side, "width": side}
    )
    return dict(processor(images=photo_HWC, return_tensors="pt"))


@pytest.mark.parametrize("side", [2, 16])
def test_patches_equal_the_processor_s(
    side: int, photo_HWC: np.ndarray[Any, Any], pixels_BCHW: Tensor
) -> None:
    expected = processed(photo_HWC, side)
    assert expected["attention_mask"].sum() == 45 * 45
    patches_BNX = patches_of(pixels_BCHW, side)
    torch.testing.assert_close(
        patches_BNX, expected["flattened_patches"][:, :2025], atol=1e-5, rtol=0
    )


def test_patches_of_a_plain_image_are_finite() -> None:
    patches_BNX = patches_of(torch.full((1, 3, 64, 64), 0.5), 2)
    assert patches_BNX.isfinite().all()
    assert (patches_BNX[:, :, 2:] == 0).all()


def test_bfloat16_pixels_keep_their_levels() -> None:
    levels = torch.arange(256, dtype=torch.float32).repeat(48).reshape(1, 3, 64, 64) / 255
    torch.testing.assert_close(patches_of(levels.bfloat16(), 2), patches_of(levels, 2))


def test_tokens_equal_the_model_s_on_what_the_processor_gives(
    photo_HWC: np.ndarray[Any, Any], pixels_BCHW: Tensor, shrunken: Shrink
) -> None:
    spec = shrunken("pix2struct", image_size=192)
    teacher = load_teacher(spec)
    with torch.inference_mode():
        expected = teacher.module(**processed(photo_HWC, 2), output_hidden_states=True)
    tokens_BND = teacher(pixels_BCHW).tokens_BND
    grid_BDRR = expected.last_hidden_state[:, :2025].transpose(1, 2).reshape(1, 32, 45, 45)
    released_BDGG = torch.nn.functional.interpolate(
        grid_BDRR, size=(32, 32), mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(
        tokens_BND, released_BDGG.flatten(2).transpose(1, 2), atol=1e-5, rtol=0
    )
    # Corners are aligned: the first and the last token stay what they were.
    torch.testing.assert_close(
        tokens_BND[:, [0, -1]], expected.last_hidden_state[:, [0, 2024]], atol=1e-5, rtol=0
    )
    for layer in (1, 2, -1):
        raw_BND = load_teacher(spec.with_changes(layer=layer))(pixels_BCHW).tokens_BND
        assert raw_BND.shape == (1, 2025, 32)
        torch.testing.assert_close(
            raw_BND, expected.hidden_states[layer][:, :2025], atol=1e-5, rtol=0
        )


def test_encoder_is_found_in_the_whole_model(tmp_path: Path, shrunken: Shrink) -> None:
    spec = shrunken("pix2struct")
    vision = {key: value for key, value in spec.model_args.items() if key != "model_type"}
    text = {"hidden_size": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.Pix2StructConfig(
        vision_config=vision, text_config={**text, "vocab_size": 9}
    )
    model = transformers.Pix2StructForConditionalGeneration(config)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(tmp_path / "whole")
    model.encoder.save_pretrained(tmp_path / "encoder")
    transformers.utils.logging.enable_progress_bar()
    for folder in ("whole", "encoder"):
        teacher = load_teacher(spec.with_changes(weights=str(tmp_path / folder)))
        assert teacher.weights_sha256 == weights_sha256(model.encoder)


def test_other_normalisation_is_refused(shrunken: Shrink) -> None:
    spec = shrunken("pix2struct", mean=(0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match=r"has mean \[0.5, .* Set mean: \[0, 0, 0\] and std: \[1"):
        load_teacher(spec)


@pytest.mark.parametrize("key", ["cls", "cls_attention"])
def test_there_is_no_cls(key: str, shrunken: Shrink) -> None:
    with pytest.raises(ConfigError, match=r"no \[CLS\] token. Set both to false."):
        load_teacher(shrunken("pix2struct", **{key: True}))
