"""The vision towers that may be a student, as small checkpoints of stock transformers.

Output: ``CASES``, which the contract of towers trains, exports and loads again, and ``table``, the
part of docs/student.md that says which tower can do what. ``python tests/helpers/tower_cases.py``
prints it, with PYTHONPATH=tests/helpers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
)

from movekd.student.towers import REFUSED
from small_tower import SMALL, build_tower

IMAGE_SIZE, OTHER_SIZE = 48, 32
"""Pixels that a small tower was made for, and those that ``student.image_size`` names."""

_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
_TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 8}
_VISION = SMALL | {"intermediate_size": 32, "image_size": IMAGE_SIZE}


@dataclass(frozen=True)
class TowerCase:
    """A tower and what is promised for it.

    Attributes:
        title: its row in the table.
        before: the tokens before the patches.
        checkpoints: class of transformers in a checkpoint -> what writes a small one.
        image_size: how the tower looks at another size.
        stock_llava: an export ``hf`` without experts is made of stock classes only.
        no_experts: why no experts fit into it.
        is_clip: the released code knows it.
    """

    title: str
    before: str
    checkpoints: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    image_size: str = "resized"
    stock_llava: bool = True
    no_experts: str | None = None
    is_clip: bool = False


def _tower(name: str) -> Callable[[Path], None]:
    return lambda folder: build_tower(name, IMAGE_SIZE).save_pretrained(folder)


def _saved(model: Any, config: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model(config()).save_pretrained(folder)

    return write


_GATED = (
    "its MLPs are gated (three linear layers), and experts are defined for two; train the tower "
    "itself, with `mole: null`."
)

CASES = (
    TowerCase(
        "CLIP",
        "[CLS]",
        {
            "CLIPVisionModel": _tower("clip"),
            "CLIPModel": _saved(
                CLIPModel, lambda: CLIPConfig(text_config=_TEXT, vision_config=_VISION)
            ),
        },
        is_clip=True,
    ),
    TowerCase(
        "SigLIP, SigLIP 2 of fixed resolution",
        "none",
        {
            "SiglipVisionModel": _tower("siglip"),
            "SiglipModel": _saved(
                SiglipModel, lambda: SiglipConfig(text_config=_TEXT, vision_config=_VISION)
            ),
        },
    ),
    TowerCase("DINOv2", "[CLS]", {"Dinov2Model": _tower("dinov2")}),
    TowerCase(
        "DINOv2 with registers",
        "[CLS], registers",
        {"Dinov2WithRegistersModel": _tower("dinov2 with registers")},
        stock_llava=False,
    ),
    TowerCase(
        "DINOv3 (ViT)",
        "[CLS], registers",
        {"DINOv3ViTModel": _tower("dinov3")},
        image_size="rotary",
        stock_llava=False,
    ),
    TowerCase(
        "DINOv2-giant (gated MLPs)",
        "[CLS]",
        {
            "Dinov2Model": _saved(
                Dinov2Model,
                lambda: Dinov2Config(
                    use_swiglu_ffn=True, **(SMALL | {"mlp_ratio": 2, "image_size": IMAGE_SIZE})
                ),
            )
        },
        no_experts=_GATED,
    ),
    TowerCase(
        "DINOv3 S+, H+ and 7B (gated MLPs)",
        "[CLS], registers",
        {
            "DINOv3ViTModel": _saved(
                DINOv3ViTModel,
                lambda: DINOv3ViTConfig(use_gated_mlp=True, num_register_tokens=4, **_VISION),
            )
        },
        image_size="rotary",
        stock_llava=False,
        no_experts=_GATED,
    ),
)

NO_TOWERS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "SigLIP 2 NaFlex": (
        "Siglip2Model",
        "siglip2_vision_model",
        lambda: Siglip2Config(
            text_config=_TEXT,
            vision_config=Siglip2VisionConfig(
                **{key: _VISION[key] for key in _VISION.keys() - {"image_size"}}
            ).to_dict(),
        ),
    ),
    "DINOv3 (ConvNeXt)": (
        "DINOv3ConvNextModel",
        "dinov3_convnext",
        lambda: DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    ),
}
"""Title -> class of transformers, type of the tower, and its config: what no student can be."""

_HEAD = (
    "tower",
    "classes of transformers",
    "before the patches",
    "`student.image_size`",
    "`hf`",
    "`encoder`",
    "`onnx`",
    "with experts",
    "`official`",
)


def table() -> str:
    """Return the table of docs/student.md with its reasons, as Markdown."""
    rows = [_HEAD, ("---",) * len(_HEAD)]
    reasons = []
    for case in CASES:
        rows.append(
            (
                case.title,
                ", ".join(f"`{name}`" for name in case.checkpoints),
                case.before,
                {"resized": "positions resized", "rotary": "rotary, as it is"}[case.image_size],
                "stock classes" if case.stock_llava else "code in the export",
                "stock class",
                "yes",
                "no" if case.no_experts else "yes",
                "yes" if case.is_clip else "no",
            )
        )
        if case.no_experts:
            reasons.append(f"- {case.title}, experts: {case.no_experts}")
    for title, (name, kind, _) in NO_TOWERS.items():
        rows.append((title, f"`{name}`", "", *["no"] * (len(_HEAD) - 3)))
        reasons.append(f"- {title}: {REFUSED[kind]}")
    reasons.append("- `official`: the released code builds only CLIP's tower, at its own size.")
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n\nWhy not:\n\n" + "\n".join(reasons) + "\n"


if __name__ == "__main__":
    print(table(), end="")
