"""Compute a vision tower with a mixture of LoRA experts in its MLPs, and LLaVA around it.

Part of movekd (Apache-2.0). Needs only torch and transformers. Copied into every export. Config
and model share this file, because transformers would import two files as unrelated packages. The
towers are CLIP, SigLIP, DINOv2 with and without registers, and DINOv3. A router sends every token
to one expert, which adds a low-rank term to both linear layers of the MLP:

    p = softmax(W_r x + b_r),   e = argmax p,   g = p_e (use_gate) or 1
    h = act(W_1 x + b_1 + s g (B1_e (A1_e x + a1_e) + c1_e))
    y =     W_2 h + b_2 + s g (B2_e (A2_e h + a2_e) + c2_e)

Dimensions: X tokens, E experts, R rank, I features in, O features out, K = E R,
J = K + E.

Source: MoVE-KD (arXiv 2501.01709).
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


@dataclass(kw_only=True)
class MovekdExpertKeys:
    """The keys that experts add to the config of a vision tower.

    Attributes:
        num_experts: experts per block.
        r: rank of each expert.
        lora_alpha: the experts' output is scaled by ``lora_alpha / r``.
        use_gate: multiply the output of an expert by its probability.
        layers_to_transform: indices of the blocks with experts; None means all.
    """

    base_config_key = "vision_config"
    attribute_map: ClassVar[dict[str, str]] = {  # older exports have these names
        "expert_rank": "r",
        "expert_alpha": "lora_alpha",
        "expert_blocks": "layers_to_transform",
    }

    num_experts: int = 3
    r: int = 32
    lora_alpha: float = 1.0
    use_gate: bool = False
    layers_to_transform: list[int] | None = None


class MovekdClipVisionConfig(MovekdExpertKeys, CLIPVisionConfig):
    """A CLIP vision tower whose MLPs have experts."""

    model_type = "movekd_clip_vision"


class MovekdSiglipVisionConfig(MovekdExpertKeys, SiglipVisionConfig):
    """A SigLIP vision tower whose MLPs have experts."""

    model_type = "movekd_siglip_vision"


class MovekdDinov2Config(MovekdExpertKeys, Dinov2Config):
    """A DINOv2 whose MLPs have experts."""

    model_type = "movekd_dinov2"


class MovekdDinov2WithRegistersConfig(MovekdExpertKeys, Dinov2WithRegistersConfig):
    """A DINOv2 with registers whose MLPs have experts."""

    model_type = "movekd_dinov2_with_registers"


class MovekdDinov3ViTConfig(MovekdExpertKeys, DINOv3ViTConfig):
    """A DINOv3 whose MLPs have experts."""

    model_type = "movekd_dinov3_vit"


class MovekdLlavaConfig(LlavaConfig):
    """LLaVA's config, under a name that an export's code can have.

    Attributes:
        projector_type: ``mlp2x_gelu``, LLaVA's own, or ``pixel_shuffle``.
    """

    model_type = "llava"

    projector_type: str = "mlp2x_gelu"


class MovekdLlavaNextConfig(LlavaNextConfig):
    """LLaVA-NeXT's config, under a name that an export's code can have.

    Attributes:
        projector_type: ``mlp2x_gelu``, LLaVA's own, or ``pixel_shuffle``.
    """

    model_type = "llava_next"

    projector_type: str = "mlp2x_gelu"


class MovekdExperts(nn.Module):
    """The low-rank terms of all experts on one linear layer, stacked.

    Attributes:
        lora_A: (E, R, I), first factors.
        lora_A_bias: (E, R).
        lora_B: (E, R, O), second factors, transposed.
        lora_B_bias: (E, O).
    """

    def __init__(self, num_experts: int, rank: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(num_experts, rank, in_features))
        self.lora_A_bias = nn.Parameter(torch.zeros(num_experts, rank))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, rank, out_features))
        self.lora_B_bias = nn.Parameter(torch.zeros(num_experts, out_features))

    def forward(self, inputs_XI: Tensor, base_XO: Tensor, mask_XE: Tensor, scale: float) -> Tensor:
        """Return ``base_XO + scale * sum_e mask_e (B_e (A_e x + a_e) + c_e)``.

        The product runs in the dtype of ``base_XO``, so half-precision towers and autocast never
        make a float32 copy of the activations.
        """
        dtype = base_XO.dtype
        low_XK = F.linear(
            inputs_XI, self.lora_A.flatten(0, 1).to(dtype), self.lora_A_bias.flatten().to(dtype)
        )
        masked_XER = low_XK.view(-1, *self.lora_A_bias.shape) * mask_XE.unsqueeze(-1)
        # The second bias is E more rows of B, which the mask itself multiplies.
        wide_XJ = torch.cat([masked_XER.flatten(1), mask_XE], dim=1)
        rows_JO = torch.cat([self.lora_B.flatten(0, 1), self.lora_B_bias], dim=0).to(dtype)
        return torch.addmm(base_XO, wide_XJ, rows_JO, alpha=scale)


MLP_PARTS = (
    ("fc1", "activation_fn", "fc2"),
    ("fc1", "activation", "fc2"),
    ("up_proj", "act_fn", "down_proj"),
)
"""Names of the parts of an MLP that experts fit into, in the towers of transformers."""


def mlp_parts(mlp: Any) -> tuple[str, str, str] | None:
    """Return the names of the first linear layer, the activation and the second linear layer.

    None: the MLP has other parts, as a gated one has.
    """
    names = {name for name, _ in mlp.named_children()}
    return next((parts for parts in MLP_PARTS if names == set(parts)), None)


class MovekdMLP(nn.Module):
    """The MLP of a block, its experts and their router.

    Args:
        mlp: the block's own MLP; its parts keep their names.
        config: the tower's.
    """

    def __init__(self, mlp: Any, config: Any) -> None:
        super().__init__()
        self.experts: dict[str, Any] = {
            "num_experts": config.num_experts,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_gate": config.use_gate,
        }
        parts = mlp_parts(mlp)
        if parts is None:
            raise ValueError(f"no experts fit into a {type(mlp).__name__}")
        for name in parts:
            setattr(self, name, getattr(mlp, name))
        self.parts, fc1 = parts, getattr(mlp, parts[0])
        width, hidden = fc1.in_features, fc1.out_features
        self.mole_fc1 = MovekdExperts(config.num_experts, config.r, width, hidden)
        self.mole_fc2 = MovekdExperts(config.num_experts, config.r, hidden, width)
        self.mole_router = nn.Linear(width, config.num_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the MLP's output, (..., N, D) -> (..., N, D)."""
        shape = hidden_states.shape
        inputs = hidden_states.flatten(0, -2)
        scale = self.experts["lora_alpha"] / self.experts["r"]
        probabilities = self.mole_router(inputs).softmax(dim=-1, dtype=torch.float32)
        numbers = torch.arange(self.experts["num_experts"], device=inputs.device)
        choice = probabilities.argmax(dim=-1, keepdim=True) == numbers
        mask = choice.to(probabilities.dtype)
        mask = (mask * probabilities if self.experts["use_gate"] else mask).to(inputs.dtype)
        fc1, activation, fc2 = (getattr(self, name) for name in self.parts)
        hidden = activation(self.mole_fc1(inputs, fc1(inputs), mask, scale))
        output: Tensor = self.mole_fc2(hidden, fc2(hidden), mask, scale)
        return output.view(shape)


class MovekdClipVisionModel(CLIPVisionModel):
    """A CLIP vision tower with experts; LLaVA reads its hidden state -2."""

    config_class = MovekdClipVisionConfig
    config: MovekdClipVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _add_experts(self.encoder.layers, config)
        self.post_init()


class MovekdSiglipVisionModel(SiglipVisionModel):
    """A SigLIP vision tower with experts."""

    config_class = MovekdSiglipVisionConfig
    config: MovekdSiglipVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _add_experts(self.encoder.layers, config)
        self.post_init()


class MovekdDinov2Model(Dinov2Model):
    """A DINOv2 with experts."""

    config_class = MovekdDinov2Config
    config: MovekdDinov2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _add_experts(self.encoder.layer, config)
        self.post_init()


class MovekdDinov2WithRegistersModel(Dinov2WithRegistersModel):
    """A DINOv2 with registers and experts."""

    config_class = MovekdDinov2WithRegistersConfig
    config: MovekdDinov2WithRegistersConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _add_experts(self.encoder.layer, config)
        self.post_init()


class MovekdDinov3ViTModel(DINOv3ViTModel):
    """A DINOv3 with experts."""

    config_class = MovekdDinov3ViTConfig
    config: MovekdDinov3ViTConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _add_experts(self.model.layer, config)
        self.post_init()


def _add_experts(blocks: Any, config: Any) -> None:
    numbers = config.layers_to_transform
    for number in range(len(blocks)) if numbers is None else numbers:
        blocks[number].mlp = MovekdMLP(blocks[number].mlp, config)


class MovekdPixelShuffle(nn.Module):
    """A projector that makes one token of 2 x 2 neighbouring patches, as InternVL's does.

    The channels of the four patches are put behind each other, row by row (Idefics3 and SmolVLM
    have the same order), then follow a LayerNorm and LLaVA's two linear layers.

    Dimensions: B views, T tokens of the tower, G x G patches, D its channels, L those of the
    language model.

    Args:
        config: LLaVA's.

    Raises:
        ValueError: G is odd.

    Source: transformers models/internvl/modeling_internvl.py (pixel_shuffle,
    InternVLMultiModalProjector).
    """

    factor = 2
    """Patches per side of the square that becomes one token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision, width = config.vision_config, config.text_config.hidden_size
        self.grid = vision.image_size // vision.patch_size
        if self.grid % self.factor:
            raise ValueError(f"a pixel shuffle needs an even grid of patches, not {self.grid}")
        channels = vision.hidden_size * self.factor**2
        self.layer_norm = nn.LayerNorm(channels)
        self.linear_1 = nn.Linear(channels, width, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=config.multimodal_projector_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return (B, G G / 4, L) of (B, T, D); tokens before the patches are left out."""
        patches = image_features[:, -self.grid * self.grid :]
        tokens = self.layer_norm(self.shuffle(patches))
        projected: Tensor = self.linear_2(self.act(self.linear_1(tokens)))
        return projected

    def shuffle(self, patches: Tensor) -> Tensor:
        """Return (B, G G / 4, 4 D) of (B, G G, D)."""
        half, factor = self.grid // self.factor, self.factor
        squares = patches.reshape(len(patches), half, factor, half, factor, -1).transpose(2, 3)
        return squares.flatten(3).flatten(1, 2)


class MovekdPatchProjector(LlavaMultiModalProjector):
    """LLaVA's projector, of which only the tokens of patches are kept.

    LLaVA itself drops [CLS], but would take registers for patches.

    Args:
        config: LLaVA's.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def forward(self, image_features: Tensor) -> Tensor:
        """Return (B, N, L) of (B, T, D): the last N of the T tokens are patches."""
        tokens: Tensor = super().forward(image_features)
        return tokens[:, -self.num_patches :]


class MovekdPixelShuffleNextModel(LlavaNextModel):
    """LLaVA-NeXT without its head, with a pixel shuffle as its projector."""

    config_class = MovekdLlavaNextConfig
    config: MovekdLlavaNextConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.multi_modal_projector = MovekdPixelShuffle(config)

    def pack_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tokens of each image, its tiles joined on the grid behind the projector.

        transformers takes the grid from the tower's patches, so it is told of larger ones.
        """
        vision, factor = self.config.vision_config, MovekdPixelShuffle.factor
        patches = SimpleNamespace(
            image_size=vision.image_size, patch_size=vision.patch_size * factor
        )
        pinpoints = self.config.image_grid_pinpoints
        config = SimpleNamespace(vision_config=patches, image_grid_pinpoints=pinpoints)
        model: Any = SimpleNamespace(config=config)  # all that the function reads
        return LlavaNextModel.pack_image_features(model, *args, **kwargs)


class MovekdLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with either projector, under a name that an export's code can have."""

    config_class = MovekdLlavaConfig
    config: MovekdLlavaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.projector_type == "pixel_shuffle":
            self.model.multi_modal_projector = MovekdPixelShuffle(config)
        elif config.vision_feature_select_strategy == "full":
            self.model.multi_modal_projector = MovekdPatchProjector(config)


class MovekdLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with either projector, under a name that an export's code can have."""

    config_class = MovekdLlavaNextConfig
    config: MovekdLlavaNextConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.projector_type == "pixel_shuffle":
            self.model = MovekdPixelShuffleNextModel(config)
        elif config.vision_feature_select_strategy == "full":
            self.model.multi_modal_projector = MovekdPatchProjector(config)


TOWERS = (
    MovekdClipVisionModel,
    MovekdSiglipVisionModel,
    MovekdDinov2Model,
    MovekdDinov2WithRegistersModel,
    MovekdDinov3ViTModel,
)


def register_auto_classes() -> None:
    """Make ``AutoModel`` know the towers, also inside of LLaVA."""
    for model in TOWERS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model, exist_ok=True)


register_auto_classes()
