"""Measure how busy a build keeps the device, and the cost of the [CLS] row (`make bench-build`).

Input: photographs that ship with installed packages. Output: results/build.json. The wall time of a
build (decoding, forward, encoding, checksums, fsync, seals; without calibration) is compared with
the forward pass of the same model on tensors in memory. Weights are random, which changes no time.

On a CPU: full-size CLIP-L/336 in float32. On a GPU: CLIP-L, EVA-02-L, SAM-L and ConvNeXt-XXL in
bfloat16.

    python benchmarks/build.py [--teachers clip,sam] [--images 64] [--pairs 3]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from movekd.cache.reader import open_cache
from movekd.cache.spec import CacheSpec, load_spec
from movekd.cli.options import build_options
from movekd.corpus.index import Corpus, open_corpus
from movekd.corpus.pack import pack_folder
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.teachers import Teacher, attention, load_teacher
from photographs import sha256_seconds, write_jpegs
from report import Figure, interleaved_ratio, write_figures

CPU = {"teachers": "clip", "images": 64, "pairs": 3, "batch_size": 8, "at_most": 1.05}
GPU = {
    "teachers": "clip,eva02,sam,convnext",
    "images": 2000,
    "pairs": 5,
    "batch_size": "auto",
    "at_most": 1.10,
}


def main() -> None:
    """Measure each teacher, print a table, write results/build.json."""
    has_gpu = torch.cuda.is_available()
    defaults = GPU if has_gpu else CPU
    parser = argparse.ArgumentParser(description="Benchmarks of a build.")
    parser.add_argument("--teachers", default=defaults["teachers"])
    parser.add_argument("--images", type=int, default=defaults["images"])
    parser.add_argument("--pairs", type=int, default=defaults["pairs"])
    parser.add_argument("--batch-size", default=defaults["batch_size"])
    arguments = parser.parse_args()
    options = build_options("auto", "auto", str(arguments.batch_size), None)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        write_jpegs(folder / "images", arguments.images)
        pack_folder(folder / "images", folder / "data")
        corpus = open_corpus(folder / "data")
        peak = matmul_flops(options)
        for name in arguments.teachers.split(","):
            spec = load_spec(name).with_changes(weights="random", calibration_images=16)
            suffix = f"_{name}" if has_gpu else ""
            figures += build_figures(
                folder / f"cache_{name}",
                corpus,
                spec,
                options,
                arguments.pairs,
                peak,
                float(str(defaults["at_most"])),
                suffix,
            )
            if name == "clip":
                figures += attention_figures(corpus, spec, options, suffix)
    defaults_asked = all(str(vars(arguments)[k]) == str(defaults[k]) for k in vars(arguments))
    write_figures("build", figures, is_complete=defaults_asked)


def build_figures(
    cache: Path,
    corpus: Corpus,
    spec: CacheSpec,
    options: BuildOptions,
    pairs: int,
    peak_flops: float,
    at_most: float,
    suffix: str,
) -> list[Figure]:
    """Time builds and forward passes alternately."""
    started = time.perf_counter()
    (first,) = build_cache(cache, corpus, [spec], geometry="crop", options=options)
    calibration_seconds = first.calibration_seconds
    print(f"{spec.name}: first build {time.perf_counter() - started:.0f} s", flush=True)
    batch_size = int(_sealed_batch_size(cache, spec))
    teacher = load_teacher(spec, options.device, options.dtype)
    pixels = [p.to(options.device) for p in _pixels(corpus, spec, options, batch_size)]
    seconds: dict[str, list[float]] = {"build": [], "forward": []}

    def forward() -> float:
        started = time.perf_counter()
        for batch in pixels:
            teacher.forward(batch)
        _finish(options)
        seconds["forward"].append(time.perf_counter() - started)
        return seconds["forward"][-1]

    def build() -> float:
        for seal in (cache / f"{spec.name}.seals").glob("0*.json"):
            seal.unlink()  # the sealed calibration stays
        with mock.patch("movekd.extract.executor.load_teacher", return_value=teacher):
            started = time.perf_counter()
            (summary,) = build_cache(cache, corpus, [spec], geometry="crop", options=options)
            seconds["build"].append(time.perf_counter() - started)
        assert summary.images_built == len(corpus)
        return seconds["build"][-1]

    forward()
    ratio, low, high = interleaved_ratio(build, forward, pairs)
    with FlopCounterMode(display=False) as counter:
        teacher.forward(pixels[0])
    flops = counter.get_total_flops() / len(pixels[0])
    rate = len(corpus) / statistics.median(seconds["build"])
    images = [corpus.read_image(image) for image in range(len(corpus))]
    what = f"{spec.name}, {len(corpus)} JPEG of 640x480, batches of {batch_size}, "
    what += str(options.dtype).removeprefix("torch.")
    return [
        Figure(
            f"build_over_forward{suffix}",
            ratio,
            f"wall time of a build over the bare forward pass of tensors in memory; {what}; "
            f"median and range of {pairs} pairs",
            (low, high),
            at_most=at_most,
        ),
        Figure(f"build_images_s{suffix}", rate, "images per second of the build"),
        Figure(
            f"forward_images_s{suffix}",
            len(corpus) / statistics.median(seconds["forward"]),
            "of the bare forward pass",
        ),
        Figure(
            f"build_tflop_s{suffix}",
            rate * flops / 1e12,
            f"achieved by the build: {flops / 1e12:.3f} TFLOP an image",
        ),
        Figure(
            f"build_over_matmul{suffix}",
            rate * flops / peak_flops,
            f"that over the device's measured matmul rate, {peak_flops / 1e12:.3g} TFLOP/s",
        ),
        Figure(
            f"sha256_share{suffix}",
            sha256_seconds(corpus, range(len(corpus))) / statistics.median(seconds["build"]),
            "time to compare the images with their SHA-256, in one thread, over that of the build; "
            f"{sum(map(len, images)) / len(images) / 1000:.0f} kB an image",
            at_most=0.01,
        ),
        Figure(f"calibration_s{suffix}", calibration_seconds, "calibration and loading, apart"),
    ]


def attention_figures(
    corpus: Corpus, spec: CacheSpec, options: BuildOptions, suffix: str
) -> list[Figure]:
    """Compare the [CLS] row with the model's eager attention map; time it within forward passes."""
    teacher = load_teacher(spec, options.device)
    assert isinstance(spec.layer, int)
    with torch.no_grad():  # random weights attend to all patches equally; scaled, to some
        block = list(teacher.module.get_submodule("encoder.layers").children())[spec.layer]
        for name, weight in block.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(4)
    (pixels, *_) = _pixels(corpus, spec, options, 2)
    pixels = pixels.to(options.device)
    row_BHN = teacher.forward(pixels).cls_attention_BHN
    assert row_BHN is not None
    module: Any = teacher.module
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = module(pixel_values=pixels, output_attentions=True).attentions
    expected_BHN = maps[spec.layer][:, :, 0, 1:]
    error = (row_BHN - expected_BHN).abs().max().item()
    teacher = teacher.to(options.dtype)
    module.set_attn_implementation("sdpa")
    shares = [_share_of_row(teacher, pixels, options) for _ in range(21)]
    return [
        Figure(
            f"cls_attention_max_error{suffix}",
            error,
            f"largest difference of the [CLS] row from the eager map, float32; rows of up to "
            f"{expected_BHN.max():.3f}",
            at_most=1e-5,
        ),
        Figure(
            f"cls_attention_cost{suffix}",
            statistics.median(shares),
            "time of the row over that of the forward pass, median of 21",
            at_most=0.01,
        ),
    ]


def _share_of_row(teacher: Teacher, pixels: Tensor, options: BuildOptions) -> float:
    """Return the time of the [CLS] row relative to the whole forward pass."""
    spent: list[float] = []
    original: Callable[..., Tensor] = attention.cls_attention_row

    def timed(*given: object) -> Tensor:
        _finish(options)
        started = time.perf_counter()
        row = original(*given)
        _finish(options)
        spent.append(time.perf_counter() - started)
        return row

    with mock.patch.object(attention, "cls_attention_row", timed):
        started = time.perf_counter()
        teacher.forward(pixels)
        _finish(options)
        return sum(spent) / (time.perf_counter() - started)


def matmul_flops(options: BuildOptions) -> float:
    """Return the device's rate of large matrix products, FLOP/s."""
    size = 8192 if options.device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=options.device, dtype=options.dtype) for _ in range(2))
    rates = []
    for _ in range(10):
        _finish(options)
        started = time.perf_counter()
        a @ b
        _finish(options)
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return statistics.median(rates)


def _pixels(
    corpus: Corpus, spec: CacheSpec, options: BuildOptions, batch_size: int
) -> list[Tensor]:
    positions = list(range(len(corpus)))
    batches = [positions[at : at + batch_size] for at in range(0, len(corpus), batch_size)]
    transform = image_transform(spec, "crop")
    stream = pixel_batches(corpus, transform, batches, num_workers=options.num_workers)
    return [batch.pixels("cpu", options.dtype) for batch in stream]


def _sealed_batch_size(cache: Path, spec: CacheSpec) -> int:
    return open_cache(cache)[spec.name].calibration.batch_size


def _finish(options: BuildOptions) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
