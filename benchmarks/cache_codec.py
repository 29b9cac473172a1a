"""What int8 takes and costs: bytes of a row, and the error of a token."""

from cache_data import HEADS, TOKENS, WIDTH, student_t_tokens
from movekd.analysis.plan import output_shape
from movekd.cache.codecs import codec
from movekd.cache.layout import teacher_layout
from movekd.cache.spec import load_spec
from movekd.cache.stats import StatsAccumulator
from report import Figure

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
        num_tokens, width, cls_width, num_heads = output_shape(spec)
        others = {"cls_width": cls_width, "num_heads": num_heads}
        native += teacher_layout("float16", num_tokens, width, **others).row_bytes
        small += teacher_layout("int8", 24 * 24, width, **others).row_bytes
    return Figure(
        "v10_grid_int8_shrink",
        native / small,
        f"{' + '.join(V10)}: {native / 1e6:.2f} MB an image in float16 on native grids, "
        f"{small / 1e6:.2f} MB in int8 on 24x24",
        at_least=5.2,
    )
