"""Check the buffers that a caller gives to read rows into.

Input: ``out`` of ``TeacherCache.read``. Output: numpy views of the same memory. Rows are written
straight into these buffers, so memory that is shared, or that may not be written to, would end in
wrong features without an error.
"""

import os
from collections.abc import Mapping
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from movekd.cache.codecs import ArrayLayout
from movekd.errors import CacheError

_MAX_WORK = 100_000  # of numpy's exact search for a shared address; more counts as shared


def require_buffers(
    out: Mapping[str, Tensor], arrays: Mapping[str, ArrayLayout], num_rows: int
) -> dict[str, npt.NDArray[Any]]:
    """Return numpy views of the buffers of each array.

    Args:
        out: name -> tensor of (num_rows, *row_shape), on the CPU.
        arrays: the arrays of the teacher.
        num_rows: number of rows that will be read.

    Raises:
        CacheError: a buffer is missing, of another kind or shape, shares memory, or cannot be
            written to. A numpy array that is only *flagged* as read-only looks like any other once
            torch holds it: torch warns about it, and this function cannot see it.
    """
    remedy = "allocate it with `empty(len(rows))`."
    if not isinstance(out, Mapping):
        raise CacheError(f"out is a {type(out).__name__}; expected name -> tensor: {remedy}")
    into: dict[str, npt.NDArray[Any]] = {}
    for name, array in arrays.items():
        shape, kind = (num_rows, *array.row_shape), getattr(torch, array.dtype)
        if fault := _fault(out.get(name), shape, kind):
            raise CacheError(
                f"out['{name}'] is {fault}; expected {kind} of {shape} on cpu: {remedy}"
            )
        into[name] = out[name].numpy()
        _require_writable(name, into[name])
    for one, other in combinations(into, 2):
        if _share_memory(into[one], into[other]):
            raise CacheError(
                f"out['{one}'] and out['{other}'] share memory; expected separate ones: {remedy}"
            )
    return into


def _fault(found: Any, shape: tuple[int, ...], kind: torch.dtype) -> str:
    """Return what is wrong with one buffer, or an empty string."""
    if not isinstance(found, Tensor):
        return "missing" if found is None else f"a {type(found).__name__}"
    if tuple(found.shape) != shape or found.dtype != kind or found.device.type != "cpu":
        return f"{found.dtype} of {tuple(found.shape)} on {found.device}"
    if found.layout != torch.strided:
        return f"a tensor of layout {found.layout}"
    if found.requires_grad:
        return "a tensor that requires grad"
    if not found.is_contiguous() and _overlaps_itself(found):
        return "a tensor whose elements share memory (an expanded one, say)"
    return ""


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements may lie at one address: the dimensions are not nested."""
    extent = 1
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dimension for dimension in dimensions if dimension[1] != 1):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False


def _share_memory(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    if not np.may_share_memory(one, other):  # compares their bounds
        return False
    try:
        return np.shares_memory(one, other, max_work=_MAX_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


@cache
def _zeros() -> int:
    return os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)


def _require_writable(name: str, array: npt.NDArray[Any]) -> None:
    """Refuse memory that is mapped for reading only: writing to it would kill the process.

    The kernel writes the first element and reports memory that it may not write to.
    """
    try:
        os.readv(_zeros(), [array[(slice(0, 1),) * array.ndim].data])
    except OSError:
        raise CacheError(
            f"out['{name}'] lies in memory that may not be written to, such as a memory map opened "
            f"for reading; expected other memory: allocate it with `empty(len(rows))`."
        ) from None
