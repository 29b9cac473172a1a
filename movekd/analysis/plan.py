"""Plan a cache before it is built: bytes, hours, read rates, break-even (`movekd cache plan`).

Input: the specs of some teachers, a corpus, and the cache's storage. Output: a ``CachePlan``.

Each teacher runs on a few images, and the storage is written and read, so shapes and rates are
measured. They do not depend on the values of the weights. So nothing is downloaded: where a spec
says the architecture, the weights are random, and the plan says so.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from movekd.analysis.cost_model import (
    HELD_BYTES,
    TABLE_BYTES,
    PlanRequest,
    ResourceEstimate,
    Runs,
    estimate_all,
    estimate_teacher,
    run_costs,
)
from movekd.analysis.disk_benchmark import DiskRates, measure_disk
from movekd.cache.codecs import codec_names
from movekd.cache.layout import TeacherLayout, grid_side, teacher_layout
from movekd.cache.spec import CacheSpec
from movekd.cache.storage import Storage, open_storage
from movekd.corpus.anyres import Views, num_views
from movekd.corpus.index import Corpus
from movekd.errors import CacheError, ConfigError, MovekdError, WeightsError, did_you_mean
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions, Progress
from movekd.extract.spec_defaults import with_defaults
from movekd.teachers import Teacher, load_teacher
from movekd.teachers.backbone import OutputShape
from movekd.teachers.providers import build_backbone

_MIN_SECONDS = 1.0
_SLOW_SECONDS = 4.0
"""An image that takes longer on a CPU is measured once: a batch of it would take minutes."""
_MAX_BATCHES = 50


@dataclass(frozen=True)
class TeacherPlan:
    """Plan of one teacher with one codec on one grid."""

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
    """Build time: the longer of forward passes and writing."""
    bound_by: Literal["forward", "disk"]
    read_bytes_per_s: float
    """Read rate that a training run needs."""
    is_read_covered: bool | None
    """Whether the measured read rate is enough; None if it was not measured."""
    break_even_runs: int | None
    """Runs after which the cache has paid, see ``cost_model``; None means never."""
    needs: ResourceEstimate
    is_spec: bool
    """Whether this is what the spec asks for."""


@dataclass(frozen=True)
class CachePlan:
    """Plan of all teachers of a cache together, each with the codec and grid of its spec."""

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
    """How long the build may take; decides the number of writers."""
    needs: ResourceEstimate
    table_bytes: int
    """Size of index.parquet and names.parquet, if every image has one name."""
    held_bytes: int
    """Memory for them in a process that trains or builds."""
    random_weights: str
    """Teachers that were measured with random weights."""
    teachers: tuple[TeacherPlan, ...]
    refused: Mapping[str, str]
    """Teacher, codec and grid -> why the codec cannot store its tokens."""


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
    tell: Callable[[str], None] = lambda step: None,
    progress: Progress = lambda what, done, total: None,
) -> CachePlan:
    """Return bytes, hours, read rates and break-even of every codec and grid of some teachers.

    Args:
        specs: the teachers.
        corpus: the images to measure with; their number is the default of ``num_images``.
        cache: where the cache would lie; its free space and rates are measured.
        views: which views of every image would be built; a training run reads the base view.
        options: device, dtype and batch size of the forward passes.
        num_images: plan for this many images, with the corpus' mean number of views per image.
        student_grid: side of the student's grid.
        runs: the training runs that will use the cache.
        assumed_rates: teacher -> images/s, instead of measuring them on this device.
        assumed_disk: rates of one process at the cache's storage, instead of measuring them.
        is_disk_measured: whether to measure the rates by writing to ``cache`` (deleted again).
        asked_hours: how long the build may take; decides the number of writers.
        tell: called with each step before it starts; a step of a large teacher takes a minute.
        progress: called before each teacher.

    Raises:
        CacheError: the corpus is empty, or a spec's codec cannot store the teacher's tokens.
        ConfigError: a rate is assumed for a teacher that is not among the specs, or is not above 0.
    """
    runs, assumed = runs or Runs(), dict(assumed_rates or {})
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image to measure with; pack images first.")
    _check_rates(assumed, [spec.name for spec in specs])
    rows_of_corpus = int(num_views(corpus.index["width"], corpus.index["height"], views).sum())
    num_images = len(corpus) if num_images is None else num_images
    num_rows = round(rows_of_corpus * num_images / len(corpus))
    rates, shapes, random = _rates_and_shapes(specs, corpus, options, assumed, tell, progress)
    refused: dict[str, str] = {}
    stored = [
        option
        for spec in specs
        for option in storage_options(spec, shapes[spec.name], student_grid, refused)
    ]
    storage = open_storage(cache)
    disk = assumed_disk or DiskRates(None, None, "not asked for")
    if is_disk_measured and assumed_disk is None:
        tell(f"plan: writing and reading at {storage.url}")
        rows = [option.arrays.row_bytes for option in stored if option.is_spec]
        disk = measure_disk(storage, sum(rows) // len(rows))
    request = PlanRequest(asked_hours, runs, disk.read_bytes_per_s)
    plans = [
        _plan_teacher(
            o, rates[o.teacher], o.teacher in assumed, num_images, num_rows, request, disk
        )
        for o in stored
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
        needs=estimate_all(
            request, [plan.needs for plan in chosen], hours, costs["read_bytes_per_s"]
        ),
        table_bytes=TABLE_BYTES * num_rows,
        held_bytes=HELD_BYTES * num_rows,
        random_weights=", ".join(random),
        teachers=tuple(plans),
        refused=refused,
        **costs,
    )


def forward_rate(
    teacher: Teacher, corpus: Corpus, options: BuildOptions
) -> tuple[float, OutputShape]:
    """Return images/s of the forward pass, and the shape of its output.

    Raises:
        CacheError: no image of the first batch can be read.
    """
    spec = teacher.spec
    images = [i % len(corpus) for i in range(options.forward_batch_size)]
    transform = image_transform(spec, "crop")
    batch = next(pixel_batches(corpus, transform, [images], num_workers=0))
    readable = [i for i in range(len(images)) if i not in batch.unreadable]
    if not readable:
        raise CacheError(
            f"the first {min(len(images), len(corpus))} images of {corpus.data_dir} cannot be read "
            f"({batch.unreadable[0]}), so nothing can be measured; replace them, or give a larger "
            "--batch-size."
        )
    pixels = batch.pixels(options.device, options.dtype)[readable]
    started, done = time.perf_counter(), 0
    if options.device == "cpu":
        shape = teacher.forward(pixels[:1]).shape
        if (seconds := time.perf_counter() - started) > _SLOW_SECONDS:
            return 1 / seconds, shape
    output = teacher.forward(pixels)  # untimed, because the first pass allocates memory
    started = time.perf_counter()
    for _ in range(_MAX_BATCHES):
        teacher.forward(pixels)
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        done += len(readable)
        if time.perf_counter() - started > _MIN_SECONDS:
            break
    return done / (time.perf_counter() - started), output.shape


def output_shape(spec: CacheSpec) -> OutputShape:
    """Return the shape of a teacher's output, without weights if possible.

    On torch's meta device a network has shapes but no values. If an operation needs values, or the
    architecture is only in the config.json of the weights, the network runs on one image of zeros.

    Raises:
        WeightsError: the real network is needed and its weights are out of reach.
    """
    pixels_BCHW = torch.zeros(1, 3, spec.image_size, spec.image_size)
    try:
        with torch.device("meta"):
            stand_in = spec.with_changes(weights="random")
            teacher = Teacher(build_backbone(stand_in), stand_in, "")
            return teacher.forward(pixels_BCHW).shape
    except MovekdError:
        return _teacher_to_measure(spec, "cpu", torch.float32)[0].forward(pixels_BCHW).shape


def _teacher_to_measure(spec: CacheSpec, device: str, dtype: torch.dtype) -> tuple[Teacher, bool]:
    """Return a teacher of a spec's shapes, and whether its weights are random.

    Raises:
        WeightsError: the architecture is only in the weights, and they are out of reach.
    """
    try:
        if spec.weights != "hub":
            return load_teacher(spec, device, dtype), spec.weights == "random"
    except WeightsError:
        pass
    stand_in = spec.with_changes(weights="random")
    try:
        teacher = Teacher(build_backbone(stand_in), stand_in, "")  # without hashing its weights
    except ConfigError:
        return load_teacher(spec, device, dtype), False
    return teacher.to(device=device, dtype=dtype), True


class StorageOption(NamedTuple):
    """One codec on one grid for one teacher."""

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
    tell: Callable[[str], None],
    progress: Progress,
) -> tuple[dict[str, float], dict[str, OutputShape], list[str]]:
    """Return images/s and output shape by teacher, and the teachers with random weights."""
    rates: dict[str, float] = {}
    shapes: dict[str, OutputShape] = {}
    random: list[str] = []
    for number, spec in enumerate(specs):
        progress("plan: teachers", number, len(specs))
        step = f"plan: {spec.name} ({number + 1} of {len(specs)})"
        if spec.name in assumed:
            tell(f"{step}: shapes of its features")
            rates[spec.name], shapes[spec.name] = assumed[spec.name], output_shape(spec)
            continue
        tell(f"{step}: making the network")
        teacher, is_random = _teacher_to_measure(spec, options.device, options.dtype)
        if is_random and spec.weights != "random":
            random.append(spec.name)
        tell(f"{step}: forward passes at {spec.image_size}x{spec.image_size} pixels")
        rates[spec.name], shapes[spec.name] = forward_rate(teacher, corpus, options)
        del teacher  # frees its memory for the next one
    return rates, shapes, random


def storage_options(
    spec: CacheSpec, shape: OutputShape, student_grid: int, refused: dict[str, str]
) -> list[StorageOption]:
    """Return the codecs and grids that can store a teacher; ``refused`` receives the others.

    The spec's own codec and grid are among them.

    Args:
        spec: the teacher.
        shape: of its output, as ``output_shape`` returns it.
        student_grid: side of the student's grid, tried beside the teacher's own.
        refused: receives ``TEACHER: CODEC on GRID`` and the reason.

    Raises:
        CacheError: the spec's own codec can't store its features.
    """
    num_tokens, width, cls_width, num_heads = shape
    if num_heads is not None and with_defaults(spec).stored_heads == "mean":
        num_heads = 1
    native = grid_side(num_tokens)
    asked = native if spec.grid == "native" else spec.grid
    options = []
    for grid, codec in itertools.product(
        dict.fromkeys((native, student_grid, asked)),
        dict.fromkeys((*codec_names(), spec.codec)),
    ):
        is_spec = (grid, codec) == (asked, spec.codec)
        try:
            arrays = teacher_layout(codec, grid**2, width, cls_width=cls_width, num_heads=num_heads)
        except CacheError as error:
            if is_spec:
                raise
            refused[f"{spec.name}: {codec} on {grid}x{grid}"] = str(error)
            continue
        options.append(StorageOption(spec.name, codec, grid, arrays, is_spec))
    return options


def _plan_teacher(
    option: StorageOption,
    rate: float,
    is_assumed: bool,
    num_images: int,
    num_rows: int,
    request: PlanRequest,
    disk: DiskRates,
) -> TeacherPlan:
    row_bytes = option.arrays.row_bytes
    total_bytes = row_bytes * num_rows
    forward_hours = num_rows / rate / 3600
    write_hours = 0.0
    if disk.write_bytes_per_s is not None:
        write_hours = total_bytes / disk.write_bytes_per_s / 3600
    hours = max(forward_hours, write_hours)  # writing runs in parallel with the teacher
    live_hours = num_images / rate / 3600
    return TeacherPlan(
        teacher=option.teacher,
        codec=option.codec,
        grid=option.grid,
        width=option.arrays.width,
        row_bytes=row_bytes,
        total_bytes=total_bytes,
        images_per_s=rate,
        is_assumed=is_assumed,
        hours=hours,
        bound_by="disk" if write_hours > forward_hours else "forward",
        needs=estimate_teacher(request, option.arrays, num_images, num_rows, forward_hours, hours),
        is_spec=option.is_spec,
        **run_costs(row_bytes, num_images, request.runs, disk, hours, live_hours),
    )


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
