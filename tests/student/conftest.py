"""Small students, and a small released checkpoint built from docs/compatibility.md alone."""

import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig

import scenes
from movekd.student.checkpoint import TrainedStudent, save_parts
from movekd.student.config import MoleKeys, StudentConfig
from movekd.student.hf_loading import quiet_libraries
from movekd.student.parameters import plain_parameters
from movekd.student.vlm import build_encoder, build_vlm

WEIGHTS = Path(scenes.__file__).parent / "weights"
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

OFFICIAL = MoleKeys(
    r=4, lora_alpha=1.0, use_gate=False, init_lora_weights="kaiming", layers_to_transform="all"
)
REVISED = MoleKeys(
    r=4, lora_alpha=4.0, use_gate=True, init_lora_weights="zero", layers_to_transform="read"
)


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    """As the commands do: advice of libraries stays out."""
    quiet_libraries()


def listed(block: int) -> dict[str, str]:
    """Return pattern -> shape of a list on the page: 0 the weights, 1 the adapters."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return dict(line.split(" ", 1) for line in blocks[block].splitlines())


def expand(patterns: dict[str, str], sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return every name and shape that a list of the page stands for."""
    counts = {"i": sizes["blocks"], "e": sizes["E"], "l": sizes["text_blocks"]}
    names = {}
    for pattern, shape in patterns.items():
        letters = [letter for letter in counts if f"{{{letter}}}" in pattern]
        terms = shape.strip("()").split(", ")
        values = tuple(sum(sizes.get(s) or int(s) for s in term.split(" + ")) for term in terms)
        for numbers in product(*(range(counts[letter]) for letter in letters)):
            names[pattern.format(**dict(zip(letters, numbers, strict=True)))] = values
    return names


SIZES = {
    **{"D": 16, "H": 32, "C": 3, "P": 8, "N": 4, "E": 3, "R": 2, "blocks": 3},
    **{"T": 24, "K": 12, "F": 40, "V": 66, "text_blocks": 2},
}
"""Of the small checkpoint."""


def released_keys(tower: Path) -> dict:
    """Return the config.json of the small checkpoint."""
    return {
        "architectures": ["MoVELlavaLlamaForCausalLM"],
        "model_type": "move_llava_llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 66,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 16,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "moe": {
            "moe_encoder": True,
            "moe_encoder_dense": False,
            "moe_encoder_lora_rank": 2,
            "moe_encoder_lora_alpha": 1,
            "moe_encoder_num_experts": 3,
        },
        "kd": {"kd_mode": True},
    }


def released_state(
    teachers=("eva", "convnext"), dtype=torch.bfloat16, vocab_size=SIZES["V"]
) -> dict[str, torch.Tensor]:
    """Return random weights under every name of the page, with the adapters of some teachers."""
    adapters = {
        pattern: shape
        for pattern, shape in listed(1).items()
        if pattern.split("_adapter_")[0] in teachers
    }
    shapes = expand(listed(0) | adapters, SIZES | {"V": vocab_size})
    generator = torch.Generator().manual_seed(7)
    return {
        name: (0.5 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


def write_released(folder: Path) -> Path:
    """Write the small checkpoint without its weights; return its directory."""
    tower, source = folder / "tower", folder / "released"
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config.save_pretrained(tower)
    keys = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tower / "preprocessor_config.json").write_text(json.dumps(keys))
    source.mkdir()
    (source / "config.json").write_text(json.dumps(released_keys(tower)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (WEIGHTS / "language_model" / name).read_text()
        (source / name).write_text(text.replace('"<image>"', '"<picture>"'))
    return source


def make_run(folder: Path, mole: MoleKeys | None, stage="finetune", **keys) -> TrainedStudent:
    """Write the model folder of a run of which every parameter that it trains differs from its
    base, as training would; return what it holds.
    """
    config = StudentConfig(
        vision_tower=str(WEIGHTS / "clip"),
        language_model=str(WEIGHTS / "language_model"),
        mole=mole,
        prompt="chat_template" if stage == "finetune" else "plain",
        **keys,
    )
    torch.manual_seed(3)
    student = build_vlm(config)
    parts = ["mole", "projector"] if mole is not None else ["projector"]
    if stage == "finetune":
        parts += ["vision_tower", "language_model"]
    with torch.no_grad():
        for name, parameter in student.vlm.named_parameters():
            is_base = ".mole_" not in name and "projector" not in name
            if stage == "finetune" or not is_base:
                parameter.add_(0.02 * torch.randn_like(parameter))
    student.vlm.eval().requires_grad_(False)
    save_parts(folder / "model", student.vlm, parts)
    student.tokenizer.save_pretrained(folder / "model")
    run = {
        "recipe": "official",
        "stage": stage,
        "student": config.model_dump(mode="json"),
        "distill": {"teachers": ["clip", "eva02"]},
        "data": {"geometry": "crop"},
    }
    (folder / "model/config.yaml").write_text(json.dumps(run))
    return TrainedStudent(student, config.prompt, "crop", folder / "model", run)


def make_encoder_run(folder: Path, mole: MoleKeys | None, tower: Path = WEIGHTS / "clip") -> Path:
    """Write a run of stage distill, an encoder that learned something; return ``folder``."""
    mean = (0.5, 0.5, 0.5)
    config = StudentConfig(
        vision_tower=str(tower), mole=mole, prompt="plain", image_mean=mean, image_std=mean
    )
    torch.manual_seed(3)
    student = build_encoder(config)
    with torch.no_grad():
        for parameter in student.vlm.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    parts = ["vision_tower"] if mole is None else ["mole", "vision_tower"]
    save_parts(folder / "model", student.vlm, parts)
    run = {
        "recipe": "revised",
        "stage": "distill",
        "student": config.model_dump(mode="json"),
        "distill": {"teachers": ["clip", "eva02"]},
        "data": {"geometry": "crop"},
    }
    (folder / "model/config.yaml").write_text(json.dumps(run))
    return folder


def assert_same_weights(left, right) -> None:
    """Check that two models hold the same tensors, whatever their modules are called."""
    left, right = plain_parameters(left), plain_parameters(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="session")
def kit():
    """The functions above."""
    return SimpleNamespace(
        WEIGHTS=WEIGHTS,
        OFFICIAL=OFFICIAL,
        REVISED=REVISED,
        listed=listed,
        expand=expand,
        released_keys=released_keys,
        released_state=released_state,
        write_released=write_released,
        make_run=make_run,
        make_encoder_run=make_encoder_run,
        assert_same_weights=assert_same_weights,
    )
