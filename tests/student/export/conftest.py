"""Trained students, for the tests of exports."""

import pytest
import torch

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


@pytest.fixture
def text_and_image(pixels):
    """Return the inputs of a student: two images, each with a few words."""

    def inputs(student):
        image = student.tokenizer.convert_tokens_to_ids("<image>")
        ids = torch.tensor([[1] + [image] * student.num_image_tokens + [7, 30]] * len(pixels))
        return {"input_ids": ids, "pixel_values": pixels}

    return inputs
