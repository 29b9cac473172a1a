"""What a cache will cost and when it pays, before it is built: `movekd cache plan`.

Each teacher runs on a few images of the corpus and the cache's place is written to and read from,
so shapes and rates are measured. Shapes and speed do not depend on the weights' values: where they
cannot be reached, random ones stand in, and the plan says so.
"""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from movekd.analysis.cost_model import (
    HELD_BYTES,
    TABLE_BYTES,
    PlanRequest,
    ResourceEstimate,
    all_needs,
    teacher_needs,
)
from movekd.analysis.disk_benchmark import DiskRates, measure_disk
from movekd.analysis.payback import Runs, run_costs
from movekd.cache.codecs import codec_names
from movekd.cache.layout import TeacherLayout, grid_side, teacher_layout
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import Storage, open_storage
from movekd.corpus.anyres import Views, num_views
from movekd.corpus.index import Corpus
from movekd.errors import CacheError, ConfigError, MovekdError, WeightsError, did_you_mean
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions, Progress
from movekd.teachers import Teacher, TeacherOutput, load_teacher
from movekd.teachers.providers import build_backbone

_MIN_SECONDS = 1.0
_MAX_BATCHES = 50

OutputShape = tuple[int, int, int | None, int | None]
"""Tokens, width, width of [CLS], heads of its attention; None where a teacher has none."""


@dataclass(frozen=True)
class TeacherPlan:
    """One way of storing one teacher."""

    teacher: str
    codec: str
    grid: int
    width: int
    row_bytes: int
    total_bytes: int
    images_per_s: float
    is_assumed: bool
    """Whether ``images_per_s`` was given instead of measured."""
    hours: float
    """To build: the longer one of the teacher's forward passes and of writing."""
    bound_by: Literal["forward", "disk"]
    read_bytes_per_s: float
    """What a training run needs."""
    is_read_covered: bool | None
    """Whether the measured read rate is enough for that; None when it was not measured."""
    break_even_runs: int | None
    """Runs after which building has paid, see ``payback``; None is never."""
    needs: ResourceEstimate
    is_spec: bool
    """Whether this is what the spec asks for."""


@dataclass(frozen=True)
class CachePlan:
    """What the teachers of a cache need together, each as its spec says."""

    num_images: int
    num_rows: int
    """Views of the images."""
    runs: Runs
    free_bytes: int | None
    """None for an object store."""
    disk: DiskRates
    total_bytes: int
    hours: float
    read_bytes_per_s: float
    is_read_covered: bool | None
    break_even_runs: int | None
    asked_hours: float
    """How long the build may take; says how many writers."""
    needs: ResourceEstimate
    table_bytes: int
    """Of index.parquet and names.parquet, if every image has one name."""
    held_bytes: int
    """Of those, what a process that trains or builds keeps in memory."""
    random_weights: str
    """Teachers that were measured with random weights."""
    teachers: tuple[TeacherPlan, ...]


def plan_cache(
    specs: list[CacheSpec],
    corpus: Corpus,
    cache: str | Path | Storage,
    *,
    views: Views = "base",
    options: BuildOptions,
    num_images: int | None = None,
    student_grid: int = 24,
    runs: Runs | None = None,
    assumed_rates: Mapping[str, float] | None = None,
    assumed_disk: DiskRates | None = None,
    is_disk_measured: bool = True,
    asked_hours: float = 24.0,
    progress: Progress = lambda what, done, total: None,
) -> CachePlan:
    """Return bytes, hours, read rates and break-even of every codec and grid of some teachers.

    Args:
        specs: the teachers.
        corpus: gives the images that are measured with, and their number.
        cache: where it would lie; its free space is read, and its rates are measured.
        views: which views of every image would be built; a training run reads the base view.
        options: device, dtype and batch size of the forward passes.
        num_images: plan for so many instead of the corpus', with as many views as those have on
            average.
        student_grid: side of the student's grid.
        runs: the training runs to come.
        assumed_rates: teacher -> images/s, instead of measuring it on this device.
        assumed_disk: rates of one process at the cache's place, instead of measuring them.
        is_disk_measured: whether to write to ``cache`` (deleted again) for its rates.
        asked_hours: how long the build may take; says how many writers.
        progress: told which measurement is next.

    Raises:
        CacheError: the corpus is empty.
        ConfigError: a rate is assumed for a teacher that is not among the specs, or is not above 0.
    """
    runs, assumed = runs or Runs(), dict(assumed_rates or {})
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image to measure with.")
    _check_rates(assumed, [spec.name for spec in specs])
    rows_of_corpus = int(num_views(corpus.index["width"], corpus.index["height"], views).sum())
    num_images = len(corpus) if num_images is None else num_images
    num_rows = round(rows_of_corpus * num_images / len(corpus))
    rates, shapes, random = _rates_and_shapes(specs, corpus, options, assumed, progress)
    offers = [offer for spec in specs for offer in _offers(spec, shapes[spec.name], student_grid)]
    storage = open_storage(cache)
    disk = assumed_disk or DiskRates(None, None, "not asked for")
    if is_disk_measured and assumed_disk is None:
        rows = [offer.arrays.row_bytes for offer in offers if offer.is_spec]
        disk = measure_disk(storage, sum(rows) // len(rows))
    asked = PlanRequest(asked_hours, runs, disk.read_bytes_per_s)
    plans = [
        _price(
            offer, rates[offer.teacher], offer.teacher in assumed, num_images, num_rows, asked, disk
        )
        for offer in offers
    ]
    chosen = [plan for plan in plans if plan.is_spec]
    hours = sum(plan.hours for plan in chosen)
    forward_hours = sum(num_images / plan.images_per_s / 3600 for plan in chosen)
    row_bytes = sum(plan.row_bytes for plan in chosen)
    costs = run_costs(row_bytes, num_images, runs, disk, hours, forward_hours)
    return CachePlan(
        num_images=num_images,
        num_rows=num_rows,
        runs=runs,
        free_bytes=storage.free_bytes(),
        disk=disk,
        total_bytes=row_bytes * num_rows,
        hours=hours,
        asked_hours=asked_hours,
        needs=all_needs(asked, [plan.needs for plan in chosen], hours, costs["read_bytes_per_s"]),
        table_bytes=TABLE_BYTES * num_rows,
        held_bytes=HELD_BYTES * num_rows,
        random_weights=", ".join(random),
        teachers=tuple(plans),
        **costs,
    )


def forward_rate(
    teacher: Teacher, corpus: Corpus, options: BuildOptions
) -> tuple[float, OutputShape]:
    """Return images/s of the bare forward pass, and the shape of what comes out.

    Raises:
        CacheError: no image of the first batch can be read.
    """
    spec = teacher.spec
    images = [i % len(corpus) for i in range(options.images_a_pass)]
    transform = image_transform(spec, "crop")
    batch = next(pixel_batches(corpus, transform, [images], num_workers=0))
    readable = [place for place in range(len(images)) if place not in batch.unreadable]
    if not readable:
        raise CacheError(
            f"the first {min(len(images), len(corpus))} images of {corpus.data_dir} cannot be read "
            f"({batch.unreadable[0]}), so there is nothing to measure with; mend them, or give a "
            "larger --batch-size."
        )
    pixels = batch.pixels(options.device, options.dtype)[readable]
    output = teacher.forward(pixels)  # the first pass allocates; it is not timed
    started, done = time.perf_counter(), 0
    for _ in range(_MAX_BATCHES):
        teacher.forward(pixels)
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        done += len(readable)
        if time.perf_counter() - started > _MIN_SECONDS:
            break
    return done / (time.perf_counter() - started), _shape(output)


def output_shape(spec: CacheSpec) -> OutputShape:
    """Return the shape of a teacher's output without running it, or else from one image.

    On torch's meta device a network has shapes and neither weights nor work. A spec that leaves
    its architecture to the weights' config.json, or a network with operations that need values,
    takes one image of zeros through the real one.

    Raises:
        WeightsError: the real one is needed and out of reach.
    """
    pixels_BCHW = torch.zeros(1, 3, spec.image_size, spec.image_size)
    try:
        with torch.device("meta"):
            stand_in = spec.with_changes(weights="random")
            teacher = Teacher(build_backbone(stand_in), stand_in, "")
            return _shape(teacher.forward(pixels_BCHW))
    except (MovekdError, RuntimeError):
        return _shape(load_teacher(spec).forward(pixels_BCHW))


class _StorageOption(NamedTuple):
    """One way of storing a teacher."""

    teacher: str
    codec: str
    grid: int
    arrays: TeacherLayout
    is_spec: bool


def _rates_and_shapes(
    specs: list[CacheSpec],
    corpus: Corpus,
    options: BuildOptions,
    assumed: Mapping[str, float],
    progress: Progress,
) -> tuple[dict[str, float], dict[str, OutputShape], list[str]]:
    """Return images/s and output shape by teacher, and who was measured with random weights."""
    rates: dict[str, float] = {}
    shapes: dict[str, OutputShape] = {}
    random: list[str] = []
    for number, spec in enumerate(specs):
        progress(f"plan: {spec.name}", number, len(specs))
        if spec.name in assumed:
            rates[spec.name], shapes[spec.name] = assumed[spec.name], output_shape(spec)
            continue
        try:
            teacher = load_teacher(spec, options.device, options.dtype)
        except WeightsError:
            random.append(spec.name)
            stand_in = spec.with_changes(weights="random")
            teacher = load_teacher(stand_in, options.device, options.dtype)
        rates[spec.name], shapes[spec.name] = forward_rate(teacher, corpus, options)
        del teacher  # the next one needs its memory
    return rates, shapes, random


def _offers(spec: CacheSpec, shape: OutputShape, student_grid: int) -> list[_StorageOption]:
    """Return every codec on the native, the student's and the spec's grid."""
    num_tokens, width, cls_width, num_heads = shape
    native = grid_side(num_tokens)
    asked = native if spec.grid == "native" else spec.grid
    offers = []
    for grid, codec in itertools.product(
        dict.fromkeys((native, student_grid, asked)), codec_names()
    ):
        arrays = teacher_layout(codec, grid**2, width, cls_width=cls_width, num_heads=num_heads)
        is_spec = (grid, codec) == (asked, spec.codec)
        offers.append(_StorageOption(spec.name, codec, grid, arrays, is_spec))
    return offers


def _price(
    offer: _StorageOption,
    rate: float,
    is_assumed: bool,
    num_images: int,
    num_rows: int,
    asked: PlanRequest,
    disk: DiskRates,
) -> TeacherPlan:
    row_bytes = offer.arrays.row_bytes
    total_bytes = row_bytes * num_rows
    forward_hours = num_rows / rate / 3600
    write_hours = 0.0
    if disk.write_bytes_per_s is not None:
        write_hours = total_bytes / disk.write_bytes_per_s / 3600
    hours = max(forward_hours, write_hours)  # a thread writes beside the teacher
    live_hours = num_images / rate / 3600
    return TeacherPlan(
        teacher=offer.teacher,
        codec=offer.codec,
        grid=offer.grid,
        width=offer.arrays.width,
        row_bytes=row_bytes,
        total_bytes=total_bytes,
        images_per_s=rate,
        is_assumed=is_assumed,
        hours=hours,
        bound_by="disk" if write_hours > forward_hours else "forward",
        needs=teacher_needs(asked, offer.arrays, num_images, num_rows, forward_hours, hours),
        is_spec=offer.is_spec,
        **run_costs(row_bytes, num_images, asked.runs, disk, hours, live_hours),
    )


def _shape(output: TeacherOutput) -> OutputShape:
    _, num_tokens, width = output.tokens_BND.shape
    cls_width = None if output.cls_BD is None else output.cls_BD.shape[1]
    attention = output.cls_attention_BHN
    return num_tokens, width, cls_width, None if attention is None else attention.shape[1]


def _check_rates(assumed: Mapping[str, float], teachers: list[str]) -> None:
    for name, rate in assumed.items():
        if name not in teachers:
            raise ConfigError(
                f"a rate is assumed for '{name}', which is not among the teachers: "
                f"{', '.join(teachers)}.{did_you_mean(name, teachers)}"
            )
        if not 0 < rate < math.inf:
            raise ConfigError(
                f"the rate assumed for '{name}' is {rate:g} images/s; give one above 0."
            )
