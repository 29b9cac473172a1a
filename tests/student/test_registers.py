"""Tests of towers with registers in a LLaVA-NeXT: in its tiles, too, registers are no patches."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from exports import export
from movekd.student.checkpoint import TrainedStudent, load_student
from movekd.student.config import StudentConfig
from movekd.student.vlm import build_vlm, image_features
from small_tower import SMALL

PATCH, TILE = 84, 336
TOWERS = {
    "dinov2": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"mlp_ratio": 2}),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, {"intermediate_size": 32}),
}


@pytest.fixture(scope="module", params=TOWERS)
def student(kit, tmp_path_factory, request):
    """A LLaVA-NeXT whose tower was made for 168 pixels."""
    model, config, keys = TOWERS[request.param]
    keys = SMALL | keys | {"patch_size": PATCH, "image_size": 168, "num_register_tokens": 4}
    folder = tmp_path_factory.mktemp("registers")
    torch.manual_seed(0)
    model(config(**keys)).save_pretrained(folder)
    student = build_vlm(
        StudentConfig(
            architecture="llava_next",
            vision_tower=str(folder),
            image_size=TILE,
            language_model=str(kit.WEIGHTS / "language_model"),
            mole=kit.OFFICIAL,
            prompt="v1",
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
        )
    )
    student.vlm.eval().requires_grad_(False)
    return student


def see(student, width, height):
    """Return the views of a photograph and their sizes."""
    photo = Image.fromarray(load_sample_images().images[0]).resize((width, height))
    file = io.BytesIO()
    photo.save(file, "PNG")
    seen = student.image_transform("stretch").see(file.getvalue(), student.views)
    return torch.from_numpy(np.asarray(seen.pixels_VCHW)), [(seen.height, seen.width)]


@pytest.mark.parametrize(("width", "height"), [(640, 427), (350, 1100), (90, 40)])
def test_an_image_has_the_tokens_that_are_counted(student, width, height):
    pixels_VCHW, sizes = see(student, width, height)
    output, tokens_VND = image_features(student.vlm, pixels_VCHW, sizes)
    assert tokens_VND.shape == (len(pixels_VCHW), (TILE // PATCH) ** 2, 16)
    (projected,) = output.pooler_output
    assert len(projected) == student.count_tokens([width], [height])[0]
    stock = LlavaNextMultiModalProjector(student.vlm.config)
    stock.load_state_dict(student.vlm.model.multi_modal_projector.state_dict())
    whole = stock(tokens_VND[0])  # the first view, without a line end
    torch.testing.assert_close(projected[: len(whole)], whole)


def test_its_export_answers_as_it_does(student, tmp_path):
    pixels_VCHW, sizes = see(student, 640, 427)
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    count = int(student.count_tokens([640], [427])[0])
    given = {
        "input_ids": torch.tensor([[1] + [image] * count + [7, 30]]),
        "pixel_values": pixels_VCHW[None],
        "image_sizes": torch.tensor(sizes),
    }
    expected = student.vlm(**given).logits
    export(TrainedStudent(student, "v1", "stretch", tmp_path / "run", {}), "hf", tmp_path / "out")
    again = load_student(tmp_path / "out").student
    assert isinstance(again.vlm, LlavaNextForConditionalGeneration)
    assert torch.equal(again.vlm(**given).logits, expected)
