"""`make bench-train`: a training step with cached targets against one with the teachers in it.

One stage-1 step of the real Trainer (images decoded, forward, KD, balance and text loss, backward,
AdamW), whose targets come from

- ``resident``: memory, already read (the limit),
- ``cached``: the cache, read by the same process and not ahead of time,
- ``live``: the teachers, run in the step on the same photographs.

Step time by turns in one process; peak memory of each in a separate process; the KD gradient at
the student's tokens from cached against live targets. Weights are random: they change no time.

Student: CLIP-L/336 at full size with experts, and a Llama of two layers.

    python benchmarks/cached_vs_live.py             two teachers of 336 pixels, width 1024;
                                                    a quarter of an hour on two cores
    python benchmarks/cached_vs_live.py --real      EVA-02-L, SAM-L and ConvNeXt-XXL at 1024 pixels,
                                                    Vicuna's width; 45 minutes
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from movekd.cache import codecs, open_cache
from movekd.cache.targets import TeacherTargets
from movekd.corpus.index import open_corpus
from movekd.distill.objective import kd_terms
from movekd.extract.run_teacher import live_features
from movekd.student.hf_loading import quiet_libraries
from movekd.student.vlm import image_features
from movekd.teachers import Teacher, load_teacher
from movekd.train.config import load_config
from movekd.train.data import Collator, ConversationDataset, Sample
from movekd.train.run import build_data, build_model
from movekd.train.trainer import DistillTrainer
from photographs import sha256_seconds
from report import Figure, interleaved_ratio, write_figures
from training_setup import GRID, REAL, SMALL, Size, batch_size, build_options, prepare, specs_of

MODES = ("resident", "cached", "live")


def main() -> None:
    """Measure, print a table, write results/train.json or results/train_real.json."""
    parser = argparse.ArgumentParser(description="Benchmark of a training step.")
    parser.add_argument("--real", action="store_true", help="The paper's teachers at full size.")
    parser.add_argument("--pairs", type=int, help="Steps of each kind.")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    size = REAL if arguments.real else SMALL
    if arguments.measure:
        print(json.dumps(peak_of_one(arguments.folder, size, arguments.measure)))
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        prepare(folder, size)
        figures = memory_figures(folder, size, arguments.real)
        figures += step_figures(folder, size, arguments.pairs or size.pairs)
    name = "train_real" if arguments.real else "train"
    write_figures(name, figures, is_complete=arguments.pairs is None)


class Bench:
    """A trainer whose steps take their targets from one of three places.

    Args:
        folder: what ``prepare`` wrote.
        size: what is measured.
        has_teachers: whether the teachers are loaded.
    """

    def __init__(self, folder: Path, size: Size, has_teachers: bool) -> None:
        self.size, self.corpus = size, open_corpus(folder / "data")
        self.config = load_config(folder / "student.yaml")
        self.cache = open_cache(folder / size.codecs[0])
        self.model, student = build_model(self.config, self.cache)
        self.model.train()
        dataset, collator = build_data(self.config, self.corpus, self.cache, student)
        assert isinstance(dataset, ConversationDataset)
        assert isinstance(collator, Collator)
        self.collator, self.without_targets = collator, replace(collator, cache=None)
        has_gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            str(folder / "run"), use_cpu=not has_gpu, bf16=has_gpu, report_to=[]
        )
        self.trainer = DistillTrainer(self.config, self.model, dataset, collator, args=arguments)
        self.prepared = self.trainer.accelerator.prepare(self.trainer.model_wrapped)
        self.optimizer = self.trainer.create_optimizer()
        every = [dataset[at] for at in range(len(dataset))]
        count = batch_size(size)
        self.batches = [every[at : at + count] for at in range(0, len(every), count)]
        self.samples = self.batches[0]  # of the steps that are timed
        self.resident = self.collator(self.samples)["targets"]
        self.options = build_options(size)
        self.teachers: dict[str, Teacher] = {}
        if has_teachers:
            specs = specs_of(size, size.codecs[0])
            self.teachers = {
                spec.name: load_teacher(spec, self.options.device, self.options.dtype)
                for spec in specs
            }
        self.seconds: dict[str, list[float]] = {mode: [] for mode in MODES}

    def batch(self, mode: str) -> dict[str, Any]:
        """Return the batch with targets from one of the three places."""
        if mode == "cached":
            found: dict[str, Any] = self.collator(self.samples)
            return found
        found = self.without_targets(self.samples)
        return found | {
            "targets": self.resident if mode == "resident" else self.live_targets(self.samples)
        }

    def live_targets(self, samples: Sequence[Sample]) -> dict[str, TeacherTargets]:
        """Run every teacher on a batch's photographs."""
        images = np.array([image for sample in samples for image in sample.images], np.int64)
        views, targets = np.zeros(len(images), np.int16), {}
        for name, teacher in self.teachers.items():
            stream = live_features(
                teacher, self.corpus, "crop", images, views, self.options, {},
                lambda *_: None, "live",
            )  # fmt: skip
            live = next(iter(stream)).resize(GRID)
            stored = {"tokens": live.tokens_BND}
            if live.cls_BD is not None:
                stored["cls"] = live.cls_BD
            if live.cls_attention_BHN is not None:
                stored["cls_attention"] = live.cls_attention_BHN
            targets[name] = TeacherTargets(
                stored, self.resident[name].stats, codecs.codec("float16")
            )
        return targets

    def step(self, mode: str) -> Callable[[], float]:
        """Return a function that takes one step and returns its seconds."""

        def run() -> float:
            started = time.perf_counter()
            batch = self.batch(mode)
            counts = self.trainer._get_num_items_in_batch([batch], self.trainer.args.device)
            self.trainer.training_step(self.prepared, batch, counts)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[mode].append(time.perf_counter() - started)
            return self.seconds[mode][-1]

        return run

    def kd_gradient(
        self, samples: Sequence[Sample], targets: Mapping[str, TeacherTargets]
    ) -> tuple[Tensor, float]:
        """Return the gradient of the KD loss at each image's tokens (B, N * D), and that loss."""
        device = self.trainer.args.device
        pixels = self.without_targets(samples)["pixel_values"].to(device, self.model.vlm.dtype)
        with torch.no_grad():
            _, student_BND = image_features(self.model.vlm, pixels)
        student_BND = student_BND.float().clone().requires_grad_()
        output = self.model.compare(student_BND, targets)
        assert self.model.objective.distill is not None
        _, loss, *_ = kd_terms(self.model.objective.distill, output)[0]
        (gradient_BND,) = torch.autograd.grad(loss, student_BND)
        return gradient_BND.flatten(1).double(), loss.item()


def gradient_figures(bench: Bench, folder: Path) -> list[Figure]:
    """Compare what cached and live targets teach, on every photograph."""
    live = [bench.live_targets(samples) for samples in bench.batches]
    figures = []
    for codec in bench.size.codecs:
        cache, cosines, cached_loss, live_loss = open_cache(folder / codec), [], 0.0, 0.0
        for samples, of_teachers in zip(bench.batches, live, strict=True):
            rows = [row for sample in samples for row in sample.rows]
            cached = {name: cache[name].read(rows) for name in bench.size.teachers}
            one, loss = bench.kd_gradient(samples, cached)
            other, expected = bench.kd_gradient(samples, of_teachers)
            cosines.append(F.cosine_similarity(one, other).min().item())
            cached_loss, live_loss = cached_loss + loss, live_loss + expected
        figures += [
            Figure(
                f"cached_live_cosine_{codec}",
                min(cosines),
                "of the KD gradient at an image's tokens, cached against live; the worst of "
                f"{sum(map(len, bench.batches))} photographs",
                at_least=0.9999 if codec == "float16" else 0.999,
            ),
            Figure(
                f"cached_live_loss_difference_{codec}",
                abs(cached_loss - live_loss) / live_loss,
                "of the KD loss, relative",
            ),
        ]
    return figures


def step_figures(folder: Path, size: Size, pairs: int) -> list[Figure]:
    """Compare gradients, then time steps by turns."""
    bench = Bench(folder, size, has_teachers=True)
    figures = gradient_figures(bench, folder)
    steps = {mode: bench.step(mode) for mode in MODES}
    for mode in MODES:
        steps[mode]()  # the optimizer's state, the first touch of everything
        bench.seconds[mode].clear()
    what = f"batch {batch_size(size)}, teachers {', '.join(size.teachers)}"
    for against, count, at_most in (
        ("resident", pairs, 1.03),
        ("live", min(size.live_pairs, pairs), None),
    ):
        ratio, low, high = interleaved_ratio(steps["cached"], steps[against], count)
        figures.append(
            Figure(
                f"cached_over_{against}",
                ratio,
                f"step time over step time; {what}; median of {count} pairs",
                (low, high),
                at_most=at_most,
            )
        )
    images = [image for sample in bench.samples for image in sample.images]
    share = sha256_seconds(bench.corpus, images) / statistics.median(bench.seconds["cached"])
    size_kb = sum(len(bench.corpus.read_image(image)) for image in images) / len(images) / 1000
    figures.append(
        Figure(
            "sha256_share",
            share,
            "time to compare a step's images with their SHA-256, in one thread, over that of the "
            f"step with cached targets; {size_kb:.0f} kB an image",
            at_most=0.01,
        )
    )
    return figures + [
        Figure(f"{mode}_step_s", statistics.median(bench.seconds[mode]), "median of a step")
        for mode in MODES
    ]


def memory_figures(folder: Path, size: Size, is_real: bool) -> list[Figure]:
    """Take two steps of each kind in a separate process."""
    figures = []
    for mode in MODES:
        command = [sys.executable, __file__, "--measure", mode, "--folder", str(folder)]
        done = subprocess.run(
            [*command, *(["--real"] if is_real else [])],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{mode}: peak {found['peak_gib']:.2f} GiB", flush=True)
        on = "of the device" if torch.cuda.is_available() else "of the process"
        figures.append(
            Figure(f"{mode}_peak_gib", found["peak_gib"], f"peak memory {on}, two steps")
        )
        if mode != "resident":
            figures.append(
                Figure(
                    "teacher_bytes_on_device"
                    if mode == "cached"
                    else "teacher_bytes_on_device_live",
                    found["teacher_bytes"],
                    "parameters and buffers in memory that are not the student's",
                    at_most=0 if mode == "cached" else None,
                )
            )
    return figures


def peak_of_one(folder: Path, size: Size, mode: str) -> dict[str, float]:
    """Take two steps in this process; return its peak memory and what is not the student's."""
    bench = Bench(folder, size, has_teachers=mode == "live")
    reset_peak()
    for _ in range(2):
        bench.step(mode)()
    return {"peak_gib": peak_bytes() / 2**30, "teacher_bytes": bytes_beside(bench.model)}


def reset_peak() -> None:
    """Forget what loading the models took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def peak_bytes() -> int:
    """Return the peak memory since ``reset_peak``."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    (kib,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(kib)


def bytes_beside(model: nn.Module) -> int:
    """Return the bytes of all modules' tensors in this process, ``model``'s apart."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):  # isinstance would ask lazy things what they are
            for tensor in (*thing.parameters(recurse=False), *thing.buffers(recurse=False)):
                if id(tensor) not in own:
                    found[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(found.values())


if __name__ == "__main__":
    main()
