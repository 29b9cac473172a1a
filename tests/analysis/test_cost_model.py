"""Tests of movekd.analysis.cost_model: what it counts is what a cache holds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.analysis.cost_model import (
    HELD_BYTES,
    PART_BYTES,
    PlanRequest,
    Runs,
    estimate_all,
    estimate_teacher,
    put_requests,
)
from movekd.analysis.disk_benchmark import DiskRates
from movekd.analysis.plan import plan_cache
from movekd.cache import layout
from movekd.cache.contents import open_contents
from movekd.cache.layout import teacher_layout
from movekd.cache.verify import status
from movekd.corpus.index import open_corpus
from movekd.extract.options import BuildOptions

ARRAYS = teacher_layout("int8", 576, 1024, cls_width=1024, num_heads=16)
counts = st.integers(1, 10**9)
hours = st.floats(1e-3, 1e6)


def needs(num_images=1000, num_rows=1000, forward=1.0, build=1.0, **asked):
    known = {"build_hours": 24.0, "runs": Runs(), "read_bytes_per_s": 1e9} | asked
    return estimate_teacher(PlanRequest(**known), ARRAYS, num_images, num_rows, forward, build)


@given(hours, hours)
def test_so_many_writers_are_in_time_and_one_less_is_not(build, asked) -> None:
    writers = needs(build=build, build_hours=asked).writers
    assert build / writers <= asked * (1 + 1e-6)
    assert writers == 1 or build / (writers - 1) > asked


@given(st.floats(1.0, 1e5), st.floats(1e5, 1e11))
def test_so_many_readers_keep_up_and_one_less_does_not(images_per_s, rate) -> None:
    found = needs(runs=Runs(images_per_s), read_bytes_per_s=rate).readers
    needed = ARRAYS.row_bytes * images_per_s
    assert found is not None
    assert found * rate >= needed * (1 - 1e-6)
    assert found == 1 or (found - 1) * rate < needed
    assert needs(read_bytes_per_s=None).readers is None


@given(st.integers(0, 10**9))
def test_parts_cover_an_object_and_small_ones_are_one_request(size) -> None:
    requests = put_requests(size)
    assert (requests == 1) == (size < 2 * PART_BYTES)
    if requests > 1:
        assert (requests - 3) * PART_BYTES < size <= (requests - 2) * PART_BYTES


@given(st.integers(1, 10**9), st.integers(1, 5))
def test_a_training_asks_for_every_array_of_every_image(num_images, epochs) -> None:
    found = needs(num_images, num_images, runs=Runs(epochs=epochs))
    rows = epochs * num_images * len(ARRAYS.arrays)
    indexes = found.get_requests - rows - found.zarr_shards
    assert found.zarr_shards == math.ceil(num_images / 128)
    assert indexes in (rows, found.zarr_shards * len(ARRAYS.arrays) * (found.readers or 0))
    assert indexes <= rows


def test_all_together_is_the_sum_but_for_who_takes_turns() -> None:
    asked = PlanRequest(build_hours=10.0, runs=Runs(), read_bytes_per_s=1e8)
    parts = [estimate_teacher(asked, ARRAYS, 1000, 3000, 4.0, hours) for hours in (4.0, 7.0)]
    together = estimate_all(asked, parts, 11.0, 2 * ARRAYS.row_bytes * 100)
    assert [part.writers for part in parts] == [1, 1]
    assert (together.writers, together.readers) == (2, 2)
    for name in ("forward_hours", "zarr_shards", "files", "put_requests", "get_requests"):
        assert getattr(together, name) == sum(getattr(part, name) for part in parts)


def test_zarr_shards_and_files_are_those_of_a_build(corpus_dir, cache_dir, tiny_specs) -> None:
    plan = plan_cache(
        tiny_specs,
        open_corpus(corpus_dir),
        "none",
        options=BuildOptions(batch_size=4, num_workers=0),
        assumed_rates={"clip": 1.0, "conv": 1.0},
        is_disk_measured=False,
    )
    cache, chosen = open_contents(cache_dir), [p for p in plan.teachers if p.is_spec]
    for found, planned in zip(status(cache), chosen, strict=True):
        names = cache.storage.sizes(layout.group_name(found.teacher))
        files = [name for name in names if "/c/" in name and "/channel_" not in name]
        assert planned.needs.zarr_shards == found.total_shards
        assert planned.needs.files == len(files) + found.sealed_shards
    assert plan.needs.files == sum(planned.needs.files for planned in chosen)


@pytest.mark.parametrize("rates", [{"assume_read": 5.0}, {"assume_write": 5.0}])
def test_assumed_rates_of_a_disk_leave_it_alone(
    tmp_path, corpus_dir, tiny_specs, monkeypatch, rates
) -> None:
    monkeypatch.setattr("movekd.analysis.plan.measure_disk", None)
    disk = DiskRates(rates.get("assume_write"), rates.get("assume_read"), "assumed")
    plan = plan_cache(
        tiny_specs,
        open_corpus(corpus_dir),
        tmp_path / "cache",
        options=BuildOptions(batch_size=4, num_workers=0),
        assumed_rates={"clip": 1.0, "conv": 1.0},
        assumed_disk=disk,
    )
    assert plan.disk == disk
    assert (plan.needs.readers is None) == (disk.read_bytes_per_s is None)


def test_what_a_process_holds_is_what_is_said(corpus_dir, cache_dir) -> None:
    corpus, catalog = open_corpus(corpus_dir), open_contents(cache_dir).catalog
    held = [value for value in vars(corpus).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in [*held, catalog.rows]) == HELD_BYTES * len(corpus)
