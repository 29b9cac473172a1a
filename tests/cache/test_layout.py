import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from movekd.cache.layout import rows_per_shard, teacher_layout


@given(st.integers(1, 2**30))
def test_rows_a_shard_are_the_largest_power_of_two_under_the_limits(row_bytes: int) -> None:
    rows = rows_per_shard(row_bytes)
    assert rows in [2**power for power in range(11)]
    assert rows == 1 or rows * row_bytes <= 128 * 2**20
    assert rows == 1024 or 2 * rows * row_bytes > 128 * 2**20


@given(
    st.sampled_from(["int8", "float16"]),
    st.integers(1, 64),
    st.integers(1, 400),
    st.none() | st.integers(1, 64),
    st.none() | st.integers(1, 8),
    st.integers(0, 5000),
)
def test_arrays_of_a_teacher(codec, num_tokens, width, cls_width, num_heads, num_rows) -> None:
    layout = teacher_layout(codec, num_tokens, width, cls_width=cls_width, num_heads=num_heads)
    assert (layout.num_tokens, layout.width) == (num_tokens, width)
    assert ("token_scale" in layout.arrays) == (codec == "int8")
    assert ("cls" in layout.arrays) == (cls_width is not None)
    assert ("cls_attention" in layout.arrays) == (num_heads is not None)
    total = 0
    for array in layout.arrays.values():
        row = np.zeros(array.row_shape, array.dtype)
        assert len(array.dimension_names) == 1 + row.ndim
        assert array.dimension_names[0] == "row"
        total += row.nbytes
    assert layout.row_bytes == total
    shards = layout.num_shards(num_rows)
    assert (shards - 1) * layout.rows_per_shard < num_rows or num_rows == 0
    assert shards * layout.rows_per_shard >= num_rows


def test_a_row_that_was_never_written_reads_as_not_a_number() -> None:
    arrays = teacher_layout("int8", 4, 8, cls_width=8, num_heads=2).arrays
    assert arrays["tokens"].fill_value == 0
    assert all(np.isnan(arrays[name].fill_value) for name in arrays if name != "tokens")
