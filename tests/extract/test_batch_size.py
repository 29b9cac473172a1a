import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from movekd.errors import CacheError
from movekd.extract import batch_size
from movekd.extract.batch_size import largest_batch_size, largest_power_of_two
from movekd.extract.options import CPU_BATCH_SIZE, BuildOptions
from movekd.teachers import load_teacher


class Device:
    """So many bytes; a teacher of a fixed size, and so many bytes an image, more for large ones."""

    def __init__(self, total: int, fixed: int, an_image: int, surprise: int = 0) -> None:
        self.total, self.fixed, self.an_image, self.surprise = total, fixed, an_image, surprise
        self.tried: list[int] = []

    def peak_bytes(self, batch_size: int) -> int:
        self.tried.append(batch_size)
        needed = self.fixed + batch_size * self.an_image
        needed += self.surprise if batch_size > 2 else 0
        if needed > self.total:
            raise torch.OutOfMemoryError("out of memory")
        return needed


@given(
    total=st.integers(1, 10**6),
    fixed=st.integers(0, 10**5),
    an_image=st.integers(1, 10**4),
    surprise=st.integers(0, 10**5),
    limit=st.sampled_from([1, 2, 8, 128, 1024]),
)
def test_the_largest_power_of_two_that_fits_is_found(
    total, fixed, an_image, surprise, limit
) -> None:
    device = Device(total, fixed, an_image, surprise)
    budget = int(0.9 * total)
    fits = [
        size
        for size in (2**power for power in range(11))
        if size <= limit and fixed + size * an_image + (surprise if size > 2 else 0) <= budget
    ]
    try:
        found = largest_power_of_two(device.peak_bytes, budget, limit)
    except torch.OutOfMemoryError:
        assert not fits
        return
    assert found == max(fits)


def test_backs_off_when_the_estimate_was_too_low() -> None:
    device = Device(total=1000, fixed=100, an_image=10, surprise=500)
    assert largest_power_of_two(device.peak_bytes, 900, 1024) == 16
    assert device.tried == [1, 2, 64, 32, 16]


def test_what_is_measured_is_a_pass_with_its_encoding(tiny_specs, monkeypatch) -> None:
    """On a stand-in for a GPU with room for eleven images and what encoding them takes."""
    passes: list[int] = []
    original = batch_size.forward_and_encode

    def counted(teacher, images, options):
        passes.append(images)
        if images > 11:
            raise torch.OutOfMemoryError("out of memory")
        return original(teacher, images, BuildOptions())

    monkeypatch.setattr(batch_size, "forward_and_encode", counted)
    for name, value in {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "mem_get_info": lambda device: (20_000, 20_000),
        "memory_reserved": lambda device: 0,
        "max_memory_allocated": lambda device: 1000 * passes[-1],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    options = BuildOptions(device="cuda", batch_size=None)
    teacher = load_teacher(tiny_specs[0])
    assert largest_batch_size(teacher, options) == 8
    assert passes == [1] * 8 + [2] * 4 + [16] + [8] * 4
    monkeypatch.setattr(batch_size, "forward_and_encode", lambda *_: counted(teacher, 12, options))
    with pytest.raises(CacheError, match=r"'clip' does not fit cuda.*0\.0 GB free.*bfloat16"):
        largest_batch_size(teacher, options)


def test_on_a_cpu_it_is_a_small_one(tiny_specs) -> None:
    options = BuildOptions(batch_size=None)
    assert largest_batch_size(load_teacher(tiny_specs[0]), options) == CPU_BATCH_SIZE
