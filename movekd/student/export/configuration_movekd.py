"""What a CLIP vision tower with a mixture of LoRA experts looks like, as config.json keeps it.

Part of movekd (Apache-2.0). Needs transformers alone.
"""

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaNextConfig


class MovekdClipVisionConfig(CLIPVisionConfig):
    """A CLIP vision tower whose MLPs have experts.

    Attributes:
        num_experts: experts a block.
        expert_rank: rank of each.
        expert_alpha: the experts' output is scaled by ``expert_alpha / expert_rank``.
        use_gate: whether it is multiplied by the router's probability.
        expert_blocks: blocks that have experts; None means all.
    """

    model_type = "movekd_clip_vision"
    base_config_key = "vision_config"

    num_experts: int = 3
    expert_rank: int = 32
    expert_alpha: float = 1.0
    use_gate: bool = False
    expert_blocks: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Registers the model. Not at the top: transformers may still be half imported then.
        from .modeling_movekd import MovekdClipVisionModel  # noqa: F401


class MovekdLlavaConfig(LlavaConfig):
    """LLaVA's own config, under a name that remote code can have."""

    model_type = "llava"


class MovekdLlavaNextConfig(LlavaNextConfig):
    """LLaVA-NeXT's own config, under a name that remote code can have."""

    model_type = "llava_next"


AutoConfig.register(MovekdClipVisionConfig.model_type, MovekdClipVisionConfig, exist_ok=True)
