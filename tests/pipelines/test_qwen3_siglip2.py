"""The pipeline of Qwen3 and SigLIP 2: its commands with small models of the same classes, and the
figures of its README, which are computed.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from movekd.analysis.plan import output_shape, storage_options
from movekd.cache.spec import load_spec
from movekd.cli.main import app
from movekd.resources import resource_dir
from movekd.student import MoleConfig, register_auto_classes
from movekd.student.checkpoint import load_student
from movekd.train.config import load_config
from pipeline_readme import check_run, commands
from small_language_model import write_language_model

PIPELINE = resource_dir("pipelines") / "qwen3_siglip2"
README = (PIPELINE / "README.md").read_text(encoding="utf-8")
TEACHERS = ["siglip2_384", "dinov2", "sam"]
STAGES = ("pretrain", "finetune", "finetune_lora", "distill")
TFLOPS = 100
"""Assumed, of one GPU, forward and backward together; as docs/scaling.md assumes it."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, shrunken: Callable[..., Any]) -> Path:
    """The tower and its anchor, the other teachers and the language model: small, same classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes = {**small, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14}
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder / "tower")
    normalisation = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "tower/preprocessor_config.json").write_text(json.dumps(normalisation))
    write_language_model("qwen3", folder / "qwen3")
    anchor = load_spec(str(PIPELINE / "siglip2_384.yaml")).model_dump(mode="json")
    keys = {"model_type": "siglip_vision_model", **sizes}
    changed = {"weights": str(folder / "tower"), "model_args": keys, "image_size": 56, "grid": 4}
    (folder / "siglip2_384.yaml").write_text(yaml.safe_dump(anchor | changed))
    for teacher in TEACHERS[1:]:
        content = shrunken(teacher, grid=4).model_dump(mode="json")
        (folder / f"{teacher}.yaml").write_text(yaml.safe_dump(content))
    return folder


def run(words: list[str], models: Path) -> str:
    """Run a command of the README with the small models, for two steps."""
    words = words[words.index("movekd") + 1 :]
    changed = {name: str(models / f"{name}.yaml") for name in TEACHERS}
    changed |= {"pipelines/qwen3_siglip2/siglip2_384.yaml": changed["siglip2_384"]}
    words = [changed.get(word, word) for word in words]
    words = [str(PIPELINE.parents[1] / w) if w.startswith("pipelines/") else w for w in words]
    if words[0] == "train":
        values: dict[str, Any] = {"student.vision_tower": models / "tower"}
        values |= {"training.max_steps": 2, "training.logging_steps": 1}
        values |= {"training.per_device_train_batch_size": 2, "training.report_to": "none"}
        values |= {"training.bf16": "false", "training.use_cpu": "true"}
        values |= {"training.dataloader_num_workers": 0}
        if "distill.yaml" not in " ".join(words):
            values["student.language_model"] = models / "qwen3"
        for key, value in values.items():
            words += ["--set", f"{key}={value}"]
        words.append("--allow-random-teachers")
    elif words[:2] == ["cache", "build"]:
        at = words.index("--grid")  # the small grids are in the specs
        words = [*words[:at], *words[at + 2 :]]
        words += ["--num-workers", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of the exporter's own packages
def test_its_commands_train_both_stages_the_adapter_and_the_encoder(
    corpus: None, models: Path
) -> None:
    words = commands("qwen3_siglip2")
    done = [w[w.index("movekd") + 1] for w in words]
    assert done == ["shards", "cache", "train"] * 2 + [
        "train",
        "shards",
        "cache",
        "train",
        "export",
    ]
    for command in words:
        run(command, models)
    for stage in ("pretrain", "finetune", "finetune_lora"):
        check_run(Path("runs") / stage, TEACHERS, has_text=True)
    check_run(Path("runs/distill"), TEACHERS, has_text=False, has_mole=False)
    assert Path("runs/finetune_lora/model/language_model_lora").is_dir()
    trained = load_student(Path("runs/finetune"))
    assert isinstance(trained.student.vlm.model.vision_tower, SiglipVisionModel)
    assert isinstance(trained.student.vlm.model.language_model, Qwen3Model)
    register_auto_classes()
    assert AutoModel.from_pretrained("my-encoder").config.hidden_size == 32


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crops: list[Any]) -> None:
    """The data of the README, four images."""
    monkeypatch.chdir(tmp_path)
    for file, folder in (
        ("blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain"),
        ("llava_v1_5_mix665k.json", "playground/data"),
    ):
        Path(folder).mkdir(parents=True)
        entries = []
        for number in range(4):
            crops[number].save(f"{folder}/{number}.png")
            turns = [
                {"from": "human", "value": "<image>\nIs there a 3?"},
                {"from": "gpt", "value": "yes"},
            ]
            entries.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns})
        Path(file).write_text(json.dumps(entries))


@pytest.mark.parametrize("stage", STAGES)
def test_its_anchor_is_the_student_before_training(stage: str) -> None:
    config = load_config(PIPELINE / f"{stage}.yaml")
    anchor = load_spec(str(PIPELINE / "siglip2_384.yaml"))
    assert config.distill is not None
    assert (config.distill.anchor, config.distill.teachers) == (anchor.name, TEACHERS)
    assert config.student.vision_tower == anchor.model
    assert config.student.vision_feature_layer == anchor.layer
    assert anchor.cls_attention  # it weighs the tokens


def count_parts() -> dict[str, int]:
    """Return the weights of each part, counted in the stock classes at full size."""
    tower = load_spec(str(PIPELINE / "siglip2_384.yaml")).model_args
    sizes = {key: value for key, value in tower.items() if key != "model_type"}
    with torch.device("meta"):
        base = SiglipVisionModel(SiglipVisionConfig(**sizes))
        num_tower = sum(p.numel() for p in base.parameters())
        student = get_peft_model(base, MoleConfig(num_experts=3, r=32))
        num_mole = sum(p.numel() for p in student.parameters()) - num_tower
        language_model = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                vocab_size=151936,
                tie_word_embeddings=True,
            )
        )
        num_language = sum(p.numel() for p in language_model.parameters())
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = get_peft_model(language_model, LoraConfig(r=128, target_modules=linear))
        num_lora = sum(p.numel() for p in lora.parameters()) - num_language
    projector = 4 * 1152 * 2560 + 2560 + 2560 * 2560 + 2560
    return {
        "tower": num_tower,
        "mole": num_mole,
        "projector": projector,
        "language_model": num_language,
        "lora": num_lora,
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_memory_and_hours_are_computed_as_the_readme_says() -> None:
    num = count_parts()
    assert num["language_model"] == pytest.approx(4.02e9, rel=1e-3)
    whole = sum(num.values()) - num["lora"]
    small = num["mole"] + num["projector"]

    def gib(weights: int, learning: int, size: int, lora: int = 0) -> str:
        return f"{(size * (weights + 3 * learning) + 16 * lora) / 2**30:.1f}"

    def hours(samples: int, tokens: int, learning: float, tower: float) -> str:
        """2 FLOPs per weight and token: forward, again for checkpointing, inputs, weights."""
        vision = num["tower"] + num["mole"]
        language = tokens * num["language_model"] * (3 + learning)
        per_sample = 2 * (576 * vision * (3 + tower) + language)
        return f"{samples * per_sample / (TFLOPS * 1e12) / 3600:.0f}"

    encoder = 2 * 576 * num["tower"] * 4 * 558_000 / (TFLOPS * 1e12) / 3600
    expected = {
        "`pretrain.yaml`": [
            gib(whole, small + num["tower"], 2),
            hours(558_000, 144 + 30, 0, 1),
        ],
        "`finetune_lora.yaml`": [
            gib(whole, small, 2, num["lora"]),
            hours(665_000, 144 + 250, 0, 0),
        ],
        "`finetune.yaml`, `student.dtype=bfloat16`": [
            gib(whole, whole, 2),
            hours(665_000, 144 + 250, 1, 1),
        ],
        "`finetune.yaml`, float32, over all GPUs": [
            gib(whole, whole, 4),
            hours(665_000, 144 + 250, 1, 1),
        ],
        "`distill.yaml`, float32": [gib(num["tower"], num["tower"], 4), f"{encoder:.0f}"],
    }
    rows = re.findall(r"^\| (`[^|]*) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
    assert {name: [memory, time] for name, memory, time in rows} == expected


def test_the_size_of_its_cache_is_the_plans() -> None:
    total = dict.fromkeys(("int8", "lloyd4", "float16"), 0)
    rows = {}
    for name in TEACHERS:
        spec = load_spec(str(PIPELINE / f"{name}.yaml") if name == TEACHERS[0] else name)
        for option in storage_options(spec, output_shape(spec), 24, {}):
            if option.grid == 24 and option.codec in total:
                rows[name, option.codec] = option.arrays.row_bytes
    for (_, codec), row_bytes in rows.items():
        total[codec] += row_bytes
    for name in TEACHERS:
        cells = [f"{rows[name, codec] / 1e6:.2f}" for codec in total]
        assert f"| {name} | {' | '.join(cells)} |" in README.replace("`", "")
    assert f"| all | {' | '.join(f'{b / 1e6:.2f}' for b in total.values())} |" in README
