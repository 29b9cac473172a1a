"""What `make gpu-check` measures, part by part; each one yields figures as soon as it has them.

The benchmarks of this folder's parent do the work, at sizes that fit into minutes of one large GPU.
``gpu.smoke`` shrinks them for a CPU.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

import build
import cached_vs_live
import mole
from cached_vs_live import Bench, bytes_beside, peak_bytes, reset_peak
from movekd.cache.codecs import codec
from movekd.cache.spec import load_spec
from movekd.cache.stats import ChannelStats
from movekd.cli.options import build_options
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.distill.objective import count_units, step_loss
from photographs import write_jpegs
from report import Figure
from training_setup import REAL, Size, prepare


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        teachers: teacher -> photographs of its build.
        build_pairs: builds and bare forward passes of each teacher.
        batch_size: of a build; ``auto``: the largest that fits.
        training: teachers, model and pairs of the training step.
        mole_images: images of a batch of the experts.
        mole_pairs: steps of each kind, eager; a third of them compiled.
        compiles: whether the experts are compiled as well.
        tokens: rows, tokens and channels that are decoded.
    """

    teachers: dict[str, int]
    build_pairs: int
    batch_size: str
    training: Size
    mole_images: int
    mole_pairs: int
    compiles: bool
    tokens: tuple[int, int, int]


H200 = Scale(
    teachers={"clip": 2048, "eva02": 256, "sam": 256, "convnext": 128},
    build_pairs=2,
    batch_size="auto",
    training=REAL,
    mole_images=8,
    mole_pairs=15,
    compiles=True,
    tokens=(64, 576, 1024),
)
CODECS = ("float16", "int8", "int4", "lloyd4", "lloyd3", "lloyd2", "lowrank64")


def mole_part(scale: Scale) -> Iterator[Figure]:
    """Time the experts against the plain MLP and against a loop over them, eager and compiled."""
    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    timed = partial(mole.timed_figures, device, dtype, scale.mole_images)
    yield from timed(scale.mole_pairs, 1.5)
    if scale.compiles:
        yield from timed(max(scale.mole_pairs // 3, 2), 1.3, is_compiled=True)


def codecs_part(scale: Scale) -> Iterator[Figure]:
    """Time decoding on the device, and hold the values against those of the CPU."""
    device = _device()
    rows, num_tokens, width = scale.tokens
    generator = torch.Generator().manual_seed(0)
    tokens_BND = torch.randn(rows, num_tokens, width, generator=generator)
    for name in CODECS:
        chosen = codec(name)
        stats = ChannelStats(torch.zeros(width), torch.ones(width)).for_codec(chosen)
        stored = chosen.encode(tokens_BND[:8], stats)
        expected = chosen.decode_standardised(stored, stats)
        here = stats.to(device)
        found = chosen.decode_standardised({k: v.to(device) for k, v in stored.items()}, here)
        error = (found.cpu().float() - expected.float()).abs().max() / expected.abs().max()
        yield Figure(
            f"{name}_decode_difference",
            error.item(),
            f"largest difference of decoded values, {device.type} against CPU, over the largest",
            at_most=1e-5,
        )
        on_device = chosen.encode(tokens_BND.to(device), here)
        seconds = _median_seconds(partial(chosen.decode_rotated, on_device, here))
        yield Figure(
            f"{name}_decode_gb_s",
            tokens_BND.numel() * 4 / 1e9 / seconds,
            f"GB of float32 per second, {rows} rows of {num_tokens} x {width} at once",
        )
        yield Figure(
            f"{name}_decode_ms_per_batch_of_8",
            1000 * seconds * 8 / rows,
            "that, in ms per 8 images of one teacher",
        )


def fsdp_part(scale: Scale) -> Iterator[Figure]:
    """Shard the model of a training with FSDP2 on one device; hold its loss against the whole."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        prepare(folder, _small_training(scale))
        bench = Bench(folder, _small_training(scale), has_teachers=False)
        model, batch = bench.model, bench.batch("cached")
        batch.pop("keys")
        device = _device()
        batch = {key: _to(value, device) for key, value in batch.items()}

        def loss_and_gradient() -> tuple[float, float]:
            model.zero_grad()
            loss, _ = step_loss(model(**batch), count_units(batch), world_size=1)
            loss.backward()  # type: ignore[no-untyped-call]
            learned = [p.grad for p in model.parameters() if p.grad is not None]
            norms = [_local(gradient).float().norm() for gradient in learned]
            return loss.item(), torch.stack(norms).norm().item()

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            torch.manual_seed(0)
            whole_loss, whole_norm = loss_and_gradient()
            distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=f"file://{folder / 'rendezvous'}",
                rank=0,
                world_size=1,
            )
            try:
                for layer in _blocks(model):
                    fully_shard(layer)
                fully_shard(model)
                sharded = [hasattr(p, "full_tensor") for p in model.parameters()]
                torch.manual_seed(0)
                loss, norm = loss_and_gradient()
                seconds = _median_seconds(loss_and_gradient, repeats=3)
            finally:
                distributed.destroy_process_group()
    what = "FSDP2 on one device, a shard per block, against the whole model"
    yield Figure("fsdp2_loss_difference", abs(loss / whole_loss - 1), f"relative; {what}",
                 at_most=1e-3)  # fmt: skip
    yield Figure("fsdp2_gradient_norm_difference", abs(norm / whole_norm - 1), f"relative; {what}",
                 at_most=1e-2)  # fmt: skip
    share, of = sum(sharded) / len(sharded), "parameters that FSDP2 shards, of all"
    yield Figure("fsdp2_sharded_share", share, of, at_least=1)
    yield Figure("fsdp2_step_s", seconds, "forward and backward of the sharded model, s")


def build_part(scale: Scale) -> Iterator[Figure]:
    """Time builds of each teacher against the bare forward pass; the [CLS] row of CLIP."""
    options = build_options("auto", "auto", scale.batch_size, None)
    peak = build.matmul_flops(options)
    for name, images in scale.teachers.items():
        with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
            folder = Path(made)
            write_jpegs(folder / "images", images)
            pack_folder(folder / "images", folder / "data")
            corpus = open_corpus(folder / "data")
            spec = load_spec(name).with_changes(weights="random", calibration_images=16)
            yield from build.build_figures(
                *(folder / "cache", corpus, spec, options, scale.build_pairs, peak, 1.10),
                f"_{name}",
            )
            if name == "clip":
                yield from build.attention_figures(corpus, spec, options, "")
        _empty_device()


def train_part(scale: Scale) -> Iterator[Figure]:
    """Time training steps with cached, resident and live targets; peak memory; what is loaded."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        prepare(folder, scale.training)
        _empty_device()
        bench = Bench(folder, scale.training, has_teachers=False)
        for mode in ("resident", "cached"):
            yield _peak(bench, mode)
        yield Figure(
            "teacher_bytes_on_device",
            bytes_beside(bench.model),
            "parameters and buffers in memory that are not the student's, with cached targets",
            at_most=0,
        )
        del bench
        _empty_device()
        yield from cached_vs_live.step_figures(folder, scale.training, scale.training.pairs)
        peak_gib = peak_bytes() / 2**30  # the live steps are the largest; loading is included
        yield Figure("live_peak_gib", peak_gib, "peak memory with the teachers, all steps")


PARTS: dict[str, Callable[[Scale], Iterator[Figure]]] = {
    "mole": mole_part,
    "codecs": codecs_part,
    "fsdp": fsdp_part,
    "train": train_part,
    "build": build_part,
}


def _peak(bench: Bench, mode: str) -> Figure:
    reset_peak()
    for _ in range(2):
        bench.step(mode)()
    return Figure(f"{mode}_peak_gib", peak_bytes() / 2**30, "peak memory, two steps")


def _small_training(scale: Scale) -> Size:
    """Return the training with its first teacher only."""
    size = scale.training
    return Size(**vars(size) | {"teachers": size.teachers[:1]})


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the blocks of the vision tower and of the language model."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    kinds = ("EncoderLayer", "DecoderLayer")
    return [b for blocks in lists for b in blocks if type(b).__name__.endswith(kinds)]


def _median_seconds(run: Callable[[], object], repeats: int = 11) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one allocates


def _local(gradient: Any) -> Tensor:
    found: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return found


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _empty_device() -> None:
    reset_peak()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
