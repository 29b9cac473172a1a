"""Buffers that rows are read into: separate memory of the right kind, or a sentence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.cache.buffers import require_buffers
from movekd.cache.layout import teacher_layout
from movekd.errors import CacheError

ARRAYS = teacher_layout("int8", 4, 130, cls_width=6, num_heads=2).arrays
ROWS = 3


def buffers() -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros((ROWS, *array.row_shape), dtype=getattr(torch, array.dtype))
        for name, array in ARRAYS.items()
    }


def test_whole_buffers_are_returned_as_the_same_memory() -> None:
    out = buffers()
    for name, array in require_buffers(out, ARRAYS, ROWS).items():
        array[:] = 7
        assert (out[name] == 7).all()


def overlapping(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    strides = [1 if at == 0 else stride for at, stride in enumerate(tensor.stride())]
    return flat.as_strided(tensor.shape, strides)


WRONG = {
    "missing": lambda tensor: None,
    "list": lambda tensor: tensor.tolist(),
    "numpy": lambda tensor: tensor.numpy(),
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "overlapping": overlapping,
    "sparse": lambda tensor: tensor.to_sparse(),
    "with grad": lambda tensor: tensor.half().requires_grad_(),
    "of meta": lambda tensor: tensor.to("meta"),
    "other rows": lambda tensor: tensor[:2],
    "other dtype": lambda tensor: tensor.double(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "transposed": lambda tensor: tensor.transpose(0, 1),
}


@pytest.mark.parametrize("name", ["tokens", "cls"])
@pytest.mark.parametrize("kind", WRONG)
def test_another_kind_of_buffer_is_a_sentence(kind, name) -> None:
    out = buffers()
    wrong = WRONG[kind](out[name])
    if kind == "with grad" and name == "tokens":
        pytest.skip("int8 has no gradient")
    with pytest.raises(CacheError, match=rf"out\['{name}'\] is .*; expected torch\..* `empty\("):
        require_buffers(out | {name: wrong}, ARRAYS, ROWS)


@pytest.mark.parametrize("out", [[], None, torch.zeros(3), "tokens"])
def test_what_is_no_mapping_is_a_sentence(out) -> None:
    with pytest.raises(CacheError, match=r"out is a .*expected name -> tensor"):
        require_buffers(out, ARRAYS, ROWS)


def test_two_buffers_over_the_same_memory_are_refused() -> None:
    out = buffers()
    flat = torch.zeros(10_000, dtype=torch.float16)
    sizes = {name: out[name].numel() for name in ("cls", "cls_attention")}
    for start, is_refused in ((0, True), (sizes["cls"] - 1, True), (sizes["cls"], False)):
        out["cls"] = flat[: sizes["cls"]].view(out["cls"].shape)
        part = flat[start : start + sizes["cls_attention"]]
        out["cls_attention"] = part.view(out["cls_attention"].shape)
        if not is_refused:
            require_buffers(out, ARRAYS, ROWS)
            continue
        with pytest.raises(CacheError, match=r"out\['cls'\] and .* share memory"):
            require_buffers(out, ARRAYS, ROWS)


def test_records_that_interleave_are_separate_memory() -> None:
    """All arrays of a row side by side, as one pinned buffer may hold them."""
    sizes = {name: array.row_bytes for name, array in ARRAYS.items()}
    records, start = torch.zeros((ROWS, sum(sizes.values())), dtype=torch.uint8), 0
    out = {}
    for name, array in ARRAYS.items():
        part = records[:, start : (start := start + sizes[name])]
        out[name] = part.view(getattr(torch, array.dtype)).unflatten(1, array.row_shape)
    require_buffers(out, ARRAYS, ROWS)


def test_a_map_opened_for_reading_is_refused_and_not_a_crash(tmp_path) -> None:
    out = buffers()
    np.save(tmp_path / "tokens.npy", out["tokens"].numpy())
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    with pytest.warns(UserWarning, match="not writable"):
        out["tokens"] = torch.from_numpy(mapped)
    with pytest.raises(CacheError, match=r"out\['tokens'\] lies in memory that may not be written"):
        require_buffers(out, ARRAYS, ROWS)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=3),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
)
def test_a_buffer_is_accepted_only_if_all_elements_have_their_own_place(shape, strides) -> None:
    """Whatever the strides; a valid layout that is not nested may be refused."""
    from movekd.cache.codecs import ArrayLayout

    flat = torch.zeros(200, dtype=torch.int8)
    tensor = flat.as_strided(shape, strides[: len(shape)])
    array = ArrayLayout("tokens", tuple(shape[1:]), "int8", ())
    try:
        require_buffers({"tokens": tensor}, {"tokens": array}, shape[0])
    except CacheError:
        assert not tensor.is_contiguous()
        return
    places = np.indices(shape).reshape(len(shape), -1).T @ np.array(strides[: len(shape)])
    assert len(set(places.tolist())) == len(places)
