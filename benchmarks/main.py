"""`make bench-main`: the demo as users run it, what its steps take, and how far from the limits.

- seconds and peak memory of each step of `movekd demo`
- ``build_over_forward``: wall time of a cache build over the bare forward pass of the same teacher
  on the same images already in memory
- ``cached_over_resident``: a training step with targets from the cache over one with targets that
  are in memory already

What the demo's students answered goes to results/demo.json, which README quotes.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from movekd.cache.reader import open_cache
from movekd.cache.spec import load_spec
from movekd.corpus.index import open_corpus
from movekd.distill.objective import count_units, step_loss
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.resources import resource_dir
from movekd.teachers import load_teacher
from movekd.train.config import load_config
from movekd.train.run import build_data, build_model
from report import RESULTS, interleaved_ratio, machine, write_results

PAIRS = 20
DIGITS = resource_dir("pipelines") / "digits"


def main() -> None:
    """Run the demo, then both comparisons over what it left."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        words = [sys.executable, "-m", "movekd", "demo", "--output", str(output), "--json"]
        result = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        write_answers(result)
        figures, notes = demo_figures(result)
        build_figures(output, figures, notes)
        train_figures(output, figures, notes)
    write_results("main", figures, notes)


def write_answers(result: dict[str, Any], path: Path = RESULTS / "demo.json") -> None:
    """Write accuracies, answers and settings of the demo's students, without their logs."""
    content = {"date": result["date"], "machine": machine(), "seed": result["seed"]}
    content["questions"] = result["questions"]
    content["arms"] = {
        arm: {key: found[key] for key in ("accuracy", "answers", "settings")}
        for arm, found in result["arms"].items()
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: benchmarks/results/{path.name}")


def demo_figures(result: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return seconds and peak memory a step."""
    figures = {"demo_s": result["seconds"]}
    notes = {"demo_s": "the whole demo"}
    for step in result["steps"]:
        name = step["name"].replace(" ", "_")
        figures[f"{name}_s"] = step["seconds"]
        figures[f"{name}_peak_gib"] = step["peak_gib"]
        notes[f"{name}_peak_gib"] = "of the process up to here"
    return figures, notes


def build_figures(output: Path, figures: dict[str, float], notes: dict[str, str]) -> None:
    """Compare a build (calibration apart) with the bare forward pass on the same 1,024 images."""
    corpus = open_corpus(output / "data")
    spec = load_spec(str(DIGITS / "teachers" / "clip.yaml"))
    teacher = load_teacher(spec)
    options = BuildOptions(batch_size=64, num_workers=1)
    batches = [list(range(start, start + 64)) for start in range(0, len(corpus), 64)]
    transform = image_transform(spec, "crop")
    pixels = [
        batch.pixels("cpu")
        for batch in pixel_batches(corpus, transform, batches, num_workers=0)
    ]  # fmt: skip

    def forward() -> None:
        for batch in pixels:
            teacher.forward(batch)

    def build() -> None:
        cache_dir = output / "bench_cache"
        for seal in (cache_dir / "clip.seals").glob("0*.json"):
            seal.unlink()  # the sealed calibration stays
        list(
            build_cache(cache_dir, corpus, [spec], geometry="crop", options=options)
        )  # fmt: skip

    build()
    ratio, low, high = interleaved_ratio(build, forward, PAIRS)
    figures |= {
        "build_over_forward": ratio,
        "build_over_forward_low": low,
        "build_over_forward_high": high,
    }
    notes["build_over_forward"] = (
        f"wall time; clip of the demo (48 px, 0.6 M parameters), {len(corpus)} images, loading "
        f"the teacher included; median of {PAIRS} pairs"
    )


def train_figures(output: Path, figures: dict[str, float], notes: dict[str, str]) -> None:
    """Compare a training step with cached targets with one whose targets are in memory."""
    overrides = [f"data.shards={output / 'data'}"]
    overrides.append(f"data.conversations=[{output / 'source' / 'finetune.json'}]")
    config = load_config(DIGITS / "finetune.yaml", overrides)
    assert config.distill is not None
    cache, corpus = open_cache(output / "cache"), open_corpus(output / "data")
    model, student = build_model(config, cache)
    model.train()
    dataset: Any
    collator: Any
    dataset, collator = build_data(config, corpus, cache, student)
    without_targets = replace(collator, cache=None)
    random = torch.Generator().manual_seed(0)
    fixed = [dataset[i] for i in torch.randint(len(dataset), (16,), generator=random).tolist()]
    targets = collator(fixed)["targets"]

    def step(batch: dict[str, Any]) -> None:
        batch.pop("keys")
        counts = count_units(batch)
        loss, _ = step_loss(model(**batch), counts, world_size=1)
        model.zero_grad()
        torch.autograd.backward(loss)

    def cached() -> None:
        step(collator(fixed))

    def in_memory() -> None:
        step(without_targets(fixed) | {"targets": targets})

    cached()
    in_memory()
    ratio, low, high = interleaved_ratio(cached, in_memory, 2 * PAIRS)
    figures |= {
        "cached_over_resident": ratio,
        "cached_over_resident_low": low,
        "cached_over_resident_high": high,
    }
    notes["cached_over_resident"] = (
        f"step time, batch 16, four teachers, data loading in the same process; median of "
        f"{2 * PAIRS} pairs"
    )


if __name__ == "__main__":
    main()
