"""Define the ``student:`` keys of student.yaml.

Used by ``vlm.build_vlm``. Every run keeps them, so that it can be loaded again.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from movekd.config import FrozenModel, Integer, Number, Text

Recipe = Literal["official", "revised", "revised_2026_11"]
"""official: as the released code. revised: without its defects. Another one is a former revised."""

PromptFormat = Literal["plain", "v1", "chat_template"]
"""plain: image, then caption (LLaVA's stage 1). v1: Vicuna's chat (LLaVA's stage 2).
chat_template: the tokenizer's template."""


Architecture = Literal["llava", "llava_next"]
"""llava: an image is one square. llava_next: the whole image, stretched, and its tiles."""

ProjectorType = Literal["mlp2x_gelu", "pixel_shuffle"]
"""LLaVA's mm_projector_type. mlp2x_gelu: one token per patch. pixel_shuffle: one per 2 x 2."""


# fmt: off
Activation = Literal[
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu",
    "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
]
# fmt: on
"""Activations of transformers without parameters."""

Level = Annotated[Number, Field(ge=0, le=1)]
"""Mean of a channel, of pixels in 0 to 1."""
Deviation = Annotated[Number, Field(gt=0, le=1)]
"""Standard deviation of a channel, of pixels in 0 to 1."""
Block = Annotated[Integer, Field(ge=-10_000, le=10_000)]
"""Index of a block; ``mole_config`` holds it against the tower's number of blocks."""


class MoleKeys(FrozenModel):
    """A Mixture of LoRA Experts in the tower's MLPs. Null keys take the recipe's value."""

    experts: Literal["shared", "per_teacher"] = Field(
        default="shared",
        description="shared: every teacher teaches all experts. per_teacher: each teacher has one "
        "expert per layer for itself, beside num_experts shared ones.",
    )
    teachers: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="With per_teacher: the teachers whose experts come first, by name. Null: "
        "`distill.teachers`.",
    )
    free_kd_share: Number = Field(
        default=0.5,
        ge=0,
        le=1,
        description="With per_teacher: share of the KD loss that is taken where all experts may be "
        "chosen; the rest is taken where a teacher's expert and the shared ones may. 1: only that.",
    )
    num_experts: Integer = Field(
        default=3,
        ge=1,
        le=256,
        description="Experts per layer that no single teacher owns: all of them with experts: "
        "shared.",
    )
    r: Integer = Field(default=32, ge=1, le=4096, description="Rank of each expert.")
    lora_alpha: Number | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Scale is lora_alpha / r. official: 1; revised: 4 r.",
    )
    lora_dropout: Number = Field(
        default=0.05, ge=0, lt=1, description="Dropout on the experts' input."
    )
    use_gate: bool | None = Field(
        default=None,
        description="Multiply the expert's output by its probability. official: false; "
        "revised: true.",
    )
    init_lora_weights: Literal["kaiming", "zero"] | None = Field(
        default=None,
        description="kaiming: the student differs from its base at step 0 (official). zero: it "
        "equals its base (revised).",
    )
    layers_to_transform: (
        Literal["all", "read"] | Annotated[list[Block], Field(min_length=1)] | None
    ) = Field(
        default=None,
        description="Blocks with experts: all, read (only the blocks before the hidden state that "
        "is read), or a list of indices from 0. official: all; revised: read.",
    )
    balance: Literal["sample", "batch"] | None = Field(
        default=None,
        description="Form of the balance loss, which keeps the experts equally busy. official: "
        "sample; revised: batch.",
    )
    balance_weight: Number = Field(
        default=0.01, ge=0, le=1e4, description="Weight of the balance loss."
    )

    @model_validator(mode="after")
    def _teachers_have_experts(self) -> "MoleKeys":
        if self.teachers is not None and self.experts == "shared":
            raise ValueError(
                "teachers names experts of teachers, and experts is shared; set experts: "
                "per_teacher, or leave teachers out"
            )
        if self.teachers is not None and len(set(self.teachers)) < len(self.teachers):
            raise ValueError("a teacher is named twice in teachers")
        return self

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, keys: Any) -> Any:
        """Read ``last_block``, the old name of ``layers_to_transform``: true is all, false read."""
        if not isinstance(keys, dict) or "last_block" not in keys:
            return keys
        if keys.get("layers_to_transform") is not None:
            raise ValueError(
                "layers_to_transform and its old name last_block are both given; remove last_block"
            )
        new = {None: None, True: "all", False: "read"}
        keys = dict(keys)
        last_block = keys.pop("last_block")
        if not isinstance(last_block, bool | None):
            raise ValueError("last_block is true or false; use layers_to_transform: all or read")
        return keys | {"layers_to_transform": new[last_block]}


class LanguageModelLoraKeys(FrozenModel):
    """LoRA on the language model's linear layers; the defaults are those of LLaVA's scripts."""

    r: Integer = Field(default=128, ge=1, le=4096, description="Rank.")
    lora_alpha: Number = Field(
        default=256.0, gt=0, le=1e6, description="Scale is lora_alpha / r, as in PEFT."
    )
    lora_dropout: Number = Field(
        default=0.05, ge=0, lt=1, description="Dropout on the adapter's input."
    )
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        default="all-linear",
        description="all-linear (all linear layers but lm_head), or names as in [q_proj, v_proj].",
    )


class StudentConfig(FrozenModel):
    """A LLaVA: vision tower with experts, projector, language model."""

    architecture: Architecture = Field(
        default="llava",
        description="llava (LLaVA-1.5): the whole image. llava_next: also up to four tiles.",
    )
    vision_tower: Text = Field(
        description="Hub id or directory of the CLIP, SigLIP, DINOv2 or DINOv3 to start from."
    )
    image_size: Integer | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Side in pixels of the square that the tower looks at, a multiple of its patch "
        "size. Null: the tower's own. Learned positions are resized as transformers does.",
    )
    language_model: Text | None = Field(
        default=None,
        description="Hub id or directory of a causal language model; stage distill loads none.",
    )
    language_model_lora: LanguageModelLoraKeys | None = Field(
        default=None,
        description="LoRA on the language model: only the adapter learns, and only it is saved. "
        "Null: the whole language model.",
    )
    load_in_4bit: bool = Field(
        default=False,
        strict=True,
        description="Hold the language model's linear layers in 4 bit (NF4, as QLoRA); they do not "
        "learn. Needs bitsandbytes.",
    )
    vision_feature_layer: Integer = Field(
        default=-2,
        lt=0,
        ge=-1000,
        description="Hidden state of the tower that is projected and distilled.",
    )
    projector_type: ProjectorType = Field(
        default="mlp2x_gelu",
        description="mlp2x_gelu (LLaVA-1.5): one token per patch. pixel_shuffle (as InternVL's): "
        "one token per 2 x 2 patches, a quarter of the tokens.",
    )
    projector_hidden_act: Activation = Field(
        default="gelu", description="Activation of the projector. LLaVA and InternVL: gelu."
    )
    mole: MoleKeys | None = Field(default_factory=MoleKeys, description="The experts. Null: none.")
    prompt: PromptFormat | None = Field(
        default=None, description="Prompt format. Null: v1 in finetune, else plain."
    )
    image_mean: tuple[Level, Level, Level] | None = Field(
        default=None, description="Null takes the vision tower's preprocessor_config.json."
    )
    image_std: tuple[Deviation, Deviation, Deviation] | None = Field(
        default=None, description="Null takes the vision tower's preprocessor_config.json."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Dtype of the weights in memory; `bf16: true` computes in bfloat16. float16 is "
        "only for imported models, to ask and to export.",
    )

    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None,
        description="Attention of tower and language model in training; flash_attention_2 needs a "
        "GPU and the package flash-attn. Null, as in `ask`, `evaluate` and exports: what "
        "transformers chooses, sdpa where the model has it.",
    )

    @model_validator(mode="after")
    def _mean_and_std_together(self) -> "StudentConfig":
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std go together: give both, or neither")
        return self
