"""What codecs take, lose and cost: bytes of a row, the error of a token, the rate of decoding.

Decoding runs in one thread, on a batch of 8 rows of CLIP-L/336: into the channels that the loss
compares (``decode_rotated``), and back into standardised channels. Rates are float32 output per
second of CPU time, so that what else runs on the machine does not count. Every codec in turn, round
by round; median and 95% interval over the rounds.

The page docs/cache-format.md shows the same in numpy: ``numpy`` is that, and must be equal to the
bit.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_data import HEADS, TOKENS, WIDTH, student_t_tokens
from movekd.analysis.plan import output_shape, storage_options
from movekd.cache.codecs import Codec, codec
from movekd.cache.layout import grid_side, teacher_layout
from movekd.cache.spec import load_spec
from movekd.cache.stats import ChannelStats, StatsAccumulator
from report import Figure, median_interval

V10 = ("clip", "eva02", "convnext")
"""The teachers of the paper's first version."""


def codec_figures() -> list[Figure]:
    """Return sizes and errors of int8 against float16."""
    whole, tokens = (
        {
            name: teacher_layout(name, TOKENS, WIDTH, cls_width=cls, num_heads=heads).row_bytes
            for name in ("int8", "float16")
        }
        for cls, heads in ((WIDTH, HEADS), (None, None))
    )
    accumulator = StatsAccumulator()
    for seed in range(4):
        accumulator.add(student_t_tokens(16, seed=seed))
    stats = accumulator.result()
    int8 = codec("int8")
    total, worst, count = 0.0, 0.0, 0
    for seed in range(4):
        tokens_BND = student_t_tokens(16, seed=1000 + seed)  # not those of the statistics
        errors = int8.error(tokens_BND, int8.encode(tokens_BND, stats), stats)
        total, worst = total + errors.sum.item(), max(worst, errors.max.item())
        count += tokens_BND.shape[0] * tokens_BND.shape[1]
    what = "relative error of a token in standardised channels, Student-t(6) values"
    return [
        Figure(
            "int8_size_over_float16",
            tokens["int8"] / tokens["float16"],
            f"stored bytes of the tokens of CLIP-L/336: {tokens['int8']}, scales included, over "
            f"{tokens['float16']}",
            at_most=0.51,
        ),
        Figure(
            "int8_row_size_over_float16",
            whole["int8"] / whole["float16"],
            "of a whole row of CLIP-L/336, whose [CLS] and attention are float16 in both",
        ),
        Figure("int8_error", total / count, f"mean {what}", at_most=0.010),
        Figure("int8_error_worst", worst, f"largest {what}, of {count}", at_most=0.02),
        _shrink_figure(),
    ]


def _shrink_figure() -> Figure:
    """Compare the exact native grids with int8 on the student's grid of 24."""
    native, small = 0, 0
    for name in V10:
        spec = load_spec(name)
        shape = output_shape(spec)
        sizes = {
            (option.codec, option.grid): option.arrays.row_bytes
            for option in storage_options(spec, shape, 24, {})
        }
        native += sizes["float16", grid_side(shape[0])]
        small += sizes["int8", 24]
    return Figure(
        "v10_grid_int8_shrink",
        native / small,
        f"{' + '.join(V10)}: {native / 1e6:.2f} MB an image in float16 on native grids, "
        f"{small / 1e6:.2f} MB in int8 on 24x24",
        at_least=5.2,
    )


ROWS, ROUNDS = 8, 41
RANK = 64
BITS = {"int4": 4, "lloyd4": 4, "lloyd3": 3, "lloyd2": 2}
TARGETS = {  # size over float16, mean error of a token of Student-t(4) values
    "int4": (0.29, None),
    "lloyd4": (0.26, 0.10),
    "lloyd3": (0.20, 0.19),
    "lloyd2": (0.135, 0.35),
}


def few_bits_figures() -> list[Figure]:
    """Return size, errors and rates of the codecs below 8 bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_few_bits_figures(), _lowrank_size()]
    finally:
        torch.set_num_threads(threads)


def _lowrank_size() -> Figure:
    """Return the size at a rank; what is lost depends on the features (``curve``)."""
    name = f"lowrank{RANK}"
    sizes = [
        teacher_layout(c, TOKENS, WIDTH, cls_width=None, num_heads=None).row_bytes
        for c in (name, "float16")
    ]
    what = f"stored bytes of the tokens of CLIP-L/336 in {name}: {sizes[0]} over {sizes[1]}"
    return Figure("lowrank_size_over_float16", sizes[0] / sizes[1], what)


def _few_bits_figures() -> list[Figure]:
    tokens_BND = _student_t4(ROWS, TOKENS, WIDTH)
    figures: list[Figure] = []
    timed: dict[str, Callable[[], object]] = {}
    for name, (size, error) in TARGETS.items():
        chosen = codec(name)
        stats = ChannelStats(torch.zeros(WIDTH), torch.ones(WIDTH)).for_codec(chosen)
        stored = chosen.encode(tokens_BND, stats)
        figures += _loss_figures(chosen, stored, stats, tokens_BND, size, error)
        arrays = {key: array.numpy() for key, array in (stored | dict(stats.codec_arrays)).items()}
        timed |= {
            f"{name}_decode": partial(chosen.decode_rotated, stored, stats),
            f"{name}_decode_standardised": partial(chosen.decode_standardised, stored, stats),
            f"{name}_decode_numpy": partial(_in_numpy, name, arrays),
            f"{name}_encode": partial(chosen.encode, tokens_BND, stats),
        }
        plain = np.ones(stored["tokens"].shape[:2], bool)
        if name != "int4":
            plain = stored["token_scale"][..., 1].numpy() == 0  # the page adds outliers later
        if not np.array_equal(
            _in_numpy(name, arrays)[plain], chosen.decode_rotated(stored, stats).numpy()[plain]
        ):
            raise SystemExit(f"{name}: numpy and torch decode to different bits")
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(ROUNDS + 1):
        for name, run in timed.items():
            started = time.process_time()
            run()
            if turn:  # the first round allocates
                seconds[name].append(time.process_time() - started)
    decoded_gb = tokens_BND.numel() * 4 / 1e9
    for name, found in seconds.items():
        if name.endswith("_encode"):
            middle, low, high = median_interval([1e3 * s / ROWS for s in found])
            what = "CPU time to encode a row of 576 x 1024 values, with one thread"
            figures.append(Figure(f"{name}_ms", middle, what, (low, high)))
            continue
        middle, low, high = median_interval([decoded_gb / s for s in found])
        must = 2.0 if name.removesuffix("_decode") in ("int4", "lloyd4") else None
        what = "GB of float32 per second of CPU time, with one thread"
        figures.append(Figure(f"{name}_gb_s", middle, what, (low, high), at_least=must))
    return figures


def _student_t4(*shape: int) -> torch.Tensor:
    """Values of Student's t with 4 degrees of freedom, of variance 1."""
    generator = torch.Generator().manual_seed(0)
    chi = torch.randn(4, *shape, generator=generator).square_().mean(0).sqrt_()
    return torch.randn(shape, generator=generator) / chi / 2**0.5


def _loss_figures(
    chosen: Codec,
    stored: dict[str, torch.Tensor],
    stats: ChannelStats,
    tokens_BND: torch.Tensor,
    size: float,
    error: float | None,
) -> list[Figure]:
    """Return size and errors."""
    stored_bytes = sum(array.nbytes for array in stored.values())
    errors = chosen.error(tokens_BND, stored, stats)
    mean = errors.sum.item() / (ROWS * TOKENS)
    of = "of a token in standardised channels, Student-t(4) values"
    return [
        Figure(
            f"{chosen.name}_size_over_float16",
            stored_bytes / (tokens_BND.numel() * 2),
            "stored bytes of the tokens of CLIP-L/336, scales included",
            at_most=size,
        ),
        Figure(f"{chosen.name}_error", mean, f"mean relative error {of}", at_most=error),
        Figure(
            f"{chosen.name}_energy_error",
            (errors.squared_error / errors.squared_norm).item(),
            f"squared error over squared norm {of}",
        ),
    ]


def _in_numpy(name: str, arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """Decode as docs/cache-format.md does, up to the rotation back."""
    packed = arrays["tokens"]
    scale = arrays["token_scale"].astype(np.float32)
    if name == "int4":
        signed = np.concatenate([packed << 4, packed], axis=-1) >> 4
        return np.asarray(signed.astype(np.float32) * scale.repeat(32, axis=-1), np.float32)
    bits = BITS[name]
    quarter = WIDTH // 4
    codes = _plane(packed[..., :quarter], 2) if bits == 3 else _plane(packed, bits)
    if bits == 3:
        codes |= _plane(packed[..., quarter:], 1) << 2
    return np.asarray(arrays["levels"][codes] * scale[..., :1], np.float32)


def _plane(part: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    shifted = [part >> at & 2**bits - 1 for at in range(0, 8, bits)]
    return np.concatenate(shifted, axis=-1)
