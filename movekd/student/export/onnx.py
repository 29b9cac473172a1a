"""Export the vision encoder as ONNX.

Input: normalised pixels. Output: the tokens that LLaVA reads. Only the blocks before the hidden
state that is read are written. Every operator is standard, and the batch is free. Needs the extra
``onnx``.
"""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from movekd.errors import ConfigError
from movekd.student.checkpoint import TrainedStudent
from movekd.student.export.hugging_face import exported_model, tower_config, tower_parameters
from movekd.student.towers import num_prefix_tokens, tower_type

ONNX_FILE = "encoder.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class EncoderTokens(nn.Module):
    """The tower up to the hidden state that is read.

    Args:
        tower: one of ``towers.TOWERS``, with the experts of ``modeling_movekd`` or without.
        layer: index of the hidden state, as in ``vision_feature_layer``.
    """

    def __init__(self, tower: Any, layer: int) -> None:
        super().__init__()
        num_blocks = tower.config.num_hidden_layers
        kind = tower_type(tower.config)
        self.mask: dict[str, None] = {"attention_mask": None} if kind.takes_mask else {}
        self.embeddings = tower.embeddings
        self.first_norm = getattr(tower, kind.first_norm) if kind.first_norm else nn.Identity()
        blocks: Any = tower.get_submodule(kind.blocks)
        self.blocks = nn.ModuleList(blocks[: num_blocks + 1 + layer])
        self.rotary: Any = getattr(tower, kind.rotary) if kind.rotary else None
        self.num_prefix = num_prefix_tokens(tower.config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return patch tokens (B, N, D) and, if the tower has one, the [CLS] embedding (B, D)."""
        hidden_states = self.first_norm(self.embeddings(pixel_values))
        given: dict[str, Any] = dict(self.mask)
        if self.rotary is not None:
            given["position_embeddings"] = self.rotary(pixel_values)
        for block in self.blocks:
            hidden_states = block(hidden_states, **given)
        tokens = hidden_states[:, self.num_prefix :]
        return (tokens, hidden_states[:, 0]) if self.num_prefix else (tokens,)


def encoder_tokens(trained: TrainedStudent) -> EncoderTokens:
    """Return the encoder of a student in float32 on the CPU, in evaluation mode."""
    vlm = trained.student.vlm
    config = tower_config(vlm)
    tower = copy.deepcopy(vlm.model.vision_tower)
    if hasattr(config, "num_experts"):
        tower = exported_model(config.model_type)(config)
        tower.load_state_dict(tower_parameters(vlm))
    tower = tower.float().cpu().eval().requires_grad_(False)
    return EncoderTokens(tower, vlm.config.vision_feature_layer).eval()


def export_onnx(trained: TrainedStudent, directory: Path) -> None:
    """Write the encoder.

    Raises:
        ConfigError: the extra ``onnx`` is not installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format onnx needs {', '.join(missing)}, which are not installed; "
            "pip install 'movekd[onnx]'."
        )
    directory.mkdir(parents=True, exist_ok=True)
    encoder = encoder_tokens(trained)
    size = trained.student.image_size
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randn(2, 3, size, size, generator=generator)
    torch.onnx.export(
        encoder,
        (pixels_BCHW,),
        str(directory / ONNX_FILE),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["tokens", "cls"][: 2 if encoder.num_prefix else 1],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=True,
        verbose=False,
    )


def tokens_in_float32(trained: TrainedStudent, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
    """Return patch tokens and, if the tower has one, the [CLS] embedding, from the run's tower."""
    vlm = trained.student.vlm
    tower = vlm.model.vision_tower
    if vlm.dtype != torch.float32 or tower.device != pixels_BCHW.device:
        tower = copy.deepcopy(tower).float().to(pixels_BCHW.device)
    output = tower(pixels_BCHW, output_hidden_states=True)
    hidden_states = output.hidden_states[vlm.config.vision_feature_layer]
    num_prefix = num_prefix_tokens(vlm.config.vision_config)
    tokens = hidden_states[:, num_prefix:]
    return (tokens, hidden_states[:, 0]) if num_prefix else (tokens,)
