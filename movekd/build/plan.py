"""What a cache will cost, before it is built: `movekd cache plan`.

Each teacher runs on a few images of the corpus, so shapes and rate are measured. Shapes and speed
do not depend on the weights' values: where they cannot be reached, random ones stand in, and the
plan says so.
"""

import itertools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from movekd.build.images import image_transform, pixel_batches
from movekd.build.run import BuildOptions
from movekd.cache.grid import grid_side
from movekd.cache.layout import teacher_layout
from movekd.cache.spec import CacheSpec
from movekd.corpus.index import Corpus
from movekd.errors import CacheError, WeightsError
from movekd.teachers import Teacher, load_teacher

_MIN_SECONDS = 1.0
_MAX_BATCHES = 50


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
    hours: float
    is_spec: bool
    """Whether this is what the spec asks for."""


@dataclass(frozen=True)
class CachePlan:
    """What all teachers of a cache need together."""

    num_images: int
    free_bytes: int
    total_bytes: int
    hours: float
    random_weights: str
    """Teachers that were measured with random weights."""
    teachers: tuple[TeacherPlan, ...]


def plan_cache(
    specs: list[CacheSpec],
    corpus: Corpus,
    cache_dir: Path,
    *,
    options: BuildOptions,
    num_images: int | None = None,
    student_grid: int = 24,
) -> CachePlan:
    """Return bytes and hours of every codec and grid of some teachers.

    Args:
        specs: the teachers.
        corpus: gives the images that are measured with, and their number.
        cache_dir: where the cache would lie; its free space is read.
        options: device, dtype and batch size of the forward passes.
        num_images: plan for so many instead of the corpus'.
        student_grid: side of the student's grid.

    Raises:
        CacheError: the corpus is empty.
    """
    if not len(corpus):
        raise CacheError(f"{corpus.data_dir} holds no image to measure with.")
    num_images = len(corpus) if num_images is None else num_images
    plans: list[TeacherPlan] = []
    random: list[str] = []
    for spec in specs:
        try:
            teacher = load_teacher(spec, options.device, options.dtype)
        except WeightsError:
            random.append(spec.name)
            stand_in = spec.with_changes(weights="random")
            teacher = load_teacher(stand_in, options.device, options.dtype)
        plans += _plan_teacher(teacher, corpus, options, num_images, student_grid)
    chosen = [plan for plan in plans if plan.is_spec]
    return CachePlan(
        num_images=num_images,
        free_bytes=shutil.disk_usage(_existing_parent(cache_dir)).free,
        total_bytes=sum(plan.total_bytes for plan in chosen),
        hours=sum(plan.hours for plan in chosen),
        random_weights=", ".join(random),
        teachers=tuple(plans),
    )


def forward_rate(
    teacher: Teacher, corpus: Corpus, options: BuildOptions
) -> tuple[float, tuple[int, int, int | None, int | None]]:
    """Return images/s of the bare forward pass, and (tokens, width, [CLS] width, heads)."""
    spec = teacher.spec
    images = [i % len(corpus) for i in range(options.batch_size)]
    transform = image_transform(spec, "crop")
    batch = next(pixel_batches(corpus, transform, [images], num_workers=0))
    pixels = batch.pixels_BCHW.to(options.device, options.dtype)
    output = teacher.forward(pixels)  # the first pass allocates; it is not timed
    started, done = time.perf_counter(), 0
    for _ in range(_MAX_BATCHES):
        teacher.forward(pixels)
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        done += len(images)
        if time.perf_counter() - started > _MIN_SECONDS:
            break
    rate = done / (time.perf_counter() - started)
    _, num_tokens, width = output.tokens_BND.shape
    cls_width = None if output.cls_BD is None else output.cls_BD.shape[1]
    attention = output.cls_attention_BHN
    return rate, (num_tokens, width, cls_width, None if attention is None else attention.shape[1])


def _plan_teacher(
    teacher: Teacher, corpus: Corpus, options: BuildOptions, num_images: int, student_grid: int
) -> list[TeacherPlan]:
    rate, (num_tokens, width, cls_width, num_heads) = forward_rate(teacher, corpus, options)
    spec, native = teacher.spec, grid_side(num_tokens)
    asked = native if spec.grid == "native" else spec.grid
    plans = []
    for grid, codec in itertools.product(
        dict.fromkeys((native, student_grid, asked)), ("float16", "int8")
    ):
        layout = teacher_layout(codec, grid**2, width, cls_width=cls_width, num_heads=num_heads)
        plans.append(
            TeacherPlan(
                teacher=spec.name,
                codec=codec,
                grid=grid,
                width=width,
                row_bytes=layout.row_bytes,
                total_bytes=layout.row_bytes * num_images,
                images_per_s=rate,
                hours=num_images / rate / 3600,
                is_spec=(grid, codec) == (asked, spec.codec),
            )
        )
    return plans


def _existing_parent(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
