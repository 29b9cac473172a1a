"""The tables of README that are called computed or measured hold what commands and files say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import demo
from movekd.cache.spec import shipped_specs
from movekd.cli.main import app
from movekd.student import MoleConfig
from movekd.train.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = ROOT / "benchmarks/results/train_real.json"
DEMO = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
STAGES = ("558000", "378000")
"""Images of LLaVA-1.5's two stages."""


def row(first: str) -> list[str]:
    """Return the cells behind the first one of the table row that begins with ``first``."""
    (line,) = re.findall(rf"^\| {re.escape(first)} \| (.*) \|$", README, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.fixture(scope="module")
def plans(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `movekd cache plan` says of both stages, with the rates of docs/scaling.md."""
    rates = {"clip": 260, "eva02": 32, "convnext": 16, "sam": 33}
    words = [part for t in rates for part in ("--teacher", t)]
    words += [part for t, r in rates.items() for part in ("--assume-rate", f"{t}={r}")]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plan"))
        shutil.copytree(corpus_dir, "data")
        for images in STAGES:
            extra = ["--shards", "data", "--num-images", images, "--no-measure-disk", "--json"]
            result = CliRunner().invoke(app, ["cache", "plan", *words, *extra])
            assert result.exception is None, result.output
            found.append(json.loads(result.stdout))
    return found


@pytest.mark.parametrize(
    ("first", "codec", "pooled", "teachers"),
    [
        ("official, float16", "float16", False, 4),
        ("official, int8", "int8", False, 4),
        ("revised, float16", "float16", True, 4),
        ("revised, int8", "int8", True, 4),
        ("revised, lloyd4", "lloyd4", True, 4),
        ("revised, int8, only clip and eva02", "int8", True, 2),
    ],
)
def test_disk_and_hours_are_those_of_cache_plan(
    plans: list[dict[str, Any]], first: str, codec: str, pooled: bool, teachers: int
) -> None:
    row_bytes = total_bytes = hours = 0.0
    for plan in plans:
        for teacher in ("clip", "eva02", "convnext", "sam")[:teachers]:
            options = [t for t in plan["teachers"] if t["teacher"] == teacher]
            hours += next(t["needs"]["forward_hours"] for t in options if t["is_spec"])
            grid = (min if pooled else max)(t["grid"] for t in options)
            (option,) = (t for t in options if t["codec"] == codec and t["grid"] == grid)
            row_bytes += option["row_bytes"] / len(plans)
            total_bytes += option["total_bytes"]
    assert row(first) == [f"{row_bytes / 1e6:.2f}", f"{total_bytes / 1e12:.1f}", f"{hours:.1f}"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_gpu_memory_is_that_of_the_weights_and_of_adamw() -> None:
    with torch.device("meta"):
        tower_config = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14,
        )  # fmt: skip
        base = CLIPVisionModel(tower_config)
        num_base = sum(p.numel() for p in base.parameters())
        tower = get_peft_model(base, MoleConfig(num_experts=3, r=32))
        language_model = LlamaForCausalLM(LlamaConfig())  # its defaults are Llama 7B's
    num_experts = sum(p.numel() for p in tower.parameters()) - num_base
    num_projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    num_language = sum(p.numel() for p in language_model.parameters())
    assert num_language == pytest.approx(6.74e9, rel=1e-3)
    everything = num_base + num_experts + num_projector + num_language
    trained = {
        "pretrain, revised": num_experts + num_projector + num_base,
        "pretrain, official": num_experts + num_projector,
        "finetune, over all GPUs": everything,
    }
    for stage, num_trained in trained.items():
        # a gradient and AdamW's two moments have the dtype of the weight
        gib = [(everything + 3 * num_trained) * size / 2**30 for size in (4, 2)]
        assert row(stage) == [f"{value:.1f}" for value in gib]


def test_the_cost_of_a_step_is_the_benchmarks() -> None:
    figures = json.loads(MEASURED.read_text(encoding="utf-8"))["figures"]
    weights = figures["teacher_bytes_on_device_live"] / 2**30
    peaks = [figures[f"{way}_peak_gib"] for way in ("live", "cached")]
    assert row("teachers run in the step") == ["138", f"{peaks[0]:.1f}", f"{weights:.1f}"]
    assert round(figures["live_step_s"]) == 138
    assert row("read from the int8 cache") == [
        *(f"{figures['cached_step_s']:.1f}", f"{peaks[1]:.1f}", "0")
    ]
    assert f"the other {peaks[0] - peaks[1] - weights:.1f} GiB" in README


def test_the_demo_answers_as_readme_says() -> None:
    arms = [DEMO["arms"][arm] for arm in ("with teachers", "without teachers")]
    with_share, without_share = (
        f"{arm['accuracy']['all']['accuracy']:.3f}".removeprefix("0") for arm in arms
    )
    total = arms[0]["accuracy"]["all"]["total"]
    assert (
        f"On {DEMO['date']} they answered {with_share} and {without_share} of {total} questions"
        in README
    )
    for number, (question, answer) in list(enumerate(DEMO["questions"]))[-4:]:
        assert row(question) == [answer, *(arm["answers"][number] for arm in arms)]


@pytest.mark.parametrize("arm", demo.ARMS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_answers_are_of_todays_settings(arm: str, stage: str, tmp_path: Path) -> None:
    """If not: `make bench-main` runs the demo and writes its answers; README quotes them."""
    changes = [*([demo.TOWER_RATE] if stage == "pretrain" else []), *demo.ARMS[arm]]
    changes.append(f"training.seed={DEMO['seed']}")
    config = load_config(demo.HERE / f"{stage}.yaml", changes)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert demo.settings(tmp_path) == DEMO["arms"][arm]["settings"][stage]


def test_teachers_are_all_named() -> None:
    (listed,) = re.findall(r"Teachers: (.*?), and\s+\[your own\]", README, re.DOTALL)
    assert set(re.split(r",\s+", listed)) == set(shipped_specs())


def test_the_status_stands_in_the_first_ten_lines() -> None:
    assert "has never run on a GPU" in " ".join(README.splitlines()[:10])
