import math
import shutil

import pytest

from corpus_files import make_unreadable
from movekd.analysis.cost_model import Runs
from movekd.analysis.disk_benchmark import DiskRates
from movekd.analysis.plan import output_shape, plan_cache
from movekd.cache.codecs import codec_names
from movekd.cache.reader import open_cache
from movekd.cache.spec import load_spec, shipped_specs
from movekd.cache.verify import status
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, ConfigError
from movekd.extract.options import BuildOptions
from movekd.teachers import Teacher, load_teacher

OPTIONS = BuildOptions(batch_size=4, num_workers=0)
DISK = DiskRates(write_bytes_per_s=1e6, read_bytes_per_s=2e6)


@pytest.fixture(autouse=True)
def _measure_briefly(monkeypatch) -> None:
    monkeypatch.setattr("movekd.analysis.plan._MIN_SECONDS", 0.0)
    monkeypatch.setattr("movekd.analysis.disk_benchmark._SECONDS", 0.0)


@pytest.fixture
def known_disk(monkeypatch) -> DiskRates:
    """A place that writes 1 MB/s and reads 2 MB/s."""
    monkeypatch.setattr("movekd.analysis.plan.measure_disk", lambda storage, row_bytes: DISK)
    return DISK


def assumed_plan(corpus_dir, tiny_specs, **more):
    rates = {"clip": 100.0, "conv": 400.0}
    return plan_cache(
        tiny_specs, open_corpus(corpus_dir), "none", options=OPTIONS, assumed_rates=rates, **more
    )


def test_the_plan_is_what_the_build_writes(tmp_path, corpus_dir, cache_dir, tiny_specs) -> None:
    plan = plan_cache(
        tiny_specs, open_corpus(corpus_dir), tmp_path / "not" / "there", options=OPTIONS
    )
    assert plan.num_images == 24
    assert plan.free_bytes is not None
    assert plan.free_bytes > 0
    built = open_cache(cache_dir)
    chosen = {part.teacher: part for part in plan.teachers if part.is_spec}
    for found in status(built):
        planned = chosen[found.teacher]
        assert planned.row_bytes == built[found.teacher].layout.row_bytes
        assert (planned.grid, planned.width, planned.codec) == (
            found.grid, found.width, found.codec,
        )  # fmt: skip
        index_bytes = (16 * 1024 + 4) * len(built[found.teacher].layout.arrays)
        assert planned.total_bytes == found.size_bytes - index_bytes
    assert plan.total_bytes == sum(part.total_bytes for part in chosen.values())
    assert plan.random_weights == ""
    assert not any(part.is_assumed for part in plan.teachers)
    assert not (tmp_path / "not").exists()


def test_every_grid_and_codec_is_offered_once(tmp_path, corpus_dir, tiny_specs) -> None:
    plan = plan_cache(
        tiny_specs,
        open_corpus(corpus_dir),
        tmp_path,
        options=OPTIONS,
        num_images=1000,
        student_grid=4,
    )
    found = [(part.teacher, part.grid, part.codec) for part in plan.teachers]
    conv = [("conv", grid, codec) for grid in (1, 4, 2) for codec in codec_names()]
    assert found == [*(("clip", 4, codec) for codec in codec_names()), *conv]
    assert all(part.total_bytes == 1000 * part.row_bytes for part in plan.teachers)


def test_weights_out_of_reach_are_replaced_and_named(tmp_path, corpus_dir, tiny_specs) -> None:
    spec = tiny_specs[0].with_changes(weights=str(tmp_path / "none.safetensors"))
    plan = plan_cache([spec], open_corpus(corpus_dir), tmp_path, options=OPTIONS)
    assert plan.random_weights == "clip"


def test_a_plan_needs_no_network_and_says_its_steps(
    tmp_path, corpus_dir, tiny_specs, monkeypatch
) -> None:
    def answers() -> bool:
        raise AssertionError("a plan asked the hub")

    monkeypatch.setattr("movekd.teachers.checkpoints.hub_answers", answers)
    monkeypatch.setattr("movekd.teachers.from_transformers.hub_answers", answers)
    specs = [spec.with_changes(weights="hub") for spec in tiny_specs]
    said = []
    plan = plan_cache(specs, open_corpus(corpus_dir), tmp_path, options=OPTIONS, tell=said.append)
    assert plan.random_weights == "clip, conv"
    assert [step.partition(":")[2] for step in said[:4]] == [
        " clip (1 of 2): making the network",
        " clip (1 of 2): forward passes at 16x16 pixels",
        " conv (2 of 2): making the network",
        " conv (2 of 2): forward passes at 32x32 pixels",
    ]
    assert said[4:] == [f"plan: writing and reading at {tmp_path}"]


def test_a_slow_teacher_is_measured_with_one_image(
    tmp_path, corpus_dir, tiny_specs, monkeypatch
) -> None:
    batches = []
    monkeypatch.setattr("movekd.analysis.plan._SLOW_SECONDS", 0.0)
    monkeypatch.setattr("movekd.teachers.teacher.Teacher.forward", _counting(batches))
    plan_cache(tiny_specs[:1], open_corpus(corpus_dir), tmp_path, options=OPTIONS)
    assert batches == [1]


def _counting(batches):
    forward = Teacher.forward

    def counted(teacher, pixels):
        batches.append(len(pixels))
        return forward(teacher, pixels)

    return counted


def test_hours_are_those_of_the_slower_one_of_teacher_and_disk(
    corpus_dir, tiny_specs, known_disk
) -> None:
    plan = assumed_plan(corpus_dir, tiny_specs, num_images=10**6)
    for part in plan.teachers:
        forward, write = (
            10**6 / part.images_per_s / 3600,
            part.total_bytes / known_disk.write_bytes_per_s / 3600,
        )
        assert part.hours == pytest.approx(max(forward, write))
        assert part.bound_by == ("disk" if write > forward else "forward")
    assert {part.bound_by for part in plan.teachers} == {"disk", "forward"}
    chosen = [part for part in plan.teachers if part.is_spec]
    assert plan.hours == pytest.approx(sum(part.hours for part in chosen))


@pytest.mark.parametrize("epochs", [1.0, 3.0])
@pytest.mark.parametrize("rate", [10.0, 500.0, 3000.0])
def test_a_cache_has_paid_when_its_runs_cost_less_than_runs_with_teachers(
    corpus_dir, tiny_specs, known_disk, epochs, rate
) -> None:
    """Add up run after run: with the cache it is cheaper from the break-even on, not before."""
    plan = assumed_plan(corpus_dir, tiny_specs, runs=Runs(rate, epochs), num_images=5000)
    chosen = [part for part in plan.teachers if part.is_spec]
    cases = [(part.row_bytes, part.hours, [part.images_per_s], part) for part in plan.teachers]
    cases.append(
        (sum(p.row_bytes for p in chosen), plan.hours, [p.images_per_s for p in chosen], plan)
    )
    seen = epochs * 5000
    for row_bytes, build_hours, teacher_rates, part in cases:
        training = seen / rate
        in_the_loop = training + sum(seen / teacher for teacher in teacher_rates)
        with_cache = max(training, seen * row_bytes / known_disk.read_bytes_per_s)
        costs = [(3600 * build_hours + n * with_cache, n * in_the_loop) for n in range(1, 200)]
        paid = [n for n, (cached, live) in enumerate(costs, 1) if cached <= live * (1 + 1e-9)]
        assert part.break_even_runs == (paid[0] if paid else None)
        assert part.read_bytes_per_s == row_bytes * rate
        assert part.is_read_covered == (row_bytes * rate <= known_disk.read_bytes_per_s)


def test_a_slow_disk_never_pays(corpus_dir, tiny_specs, monkeypatch) -> None:
    slow = DiskRates(write_bytes_per_s=1e6, read_bytes_per_s=1e3)
    monkeypatch.setattr("movekd.analysis.plan.measure_disk", lambda storage, row_bytes: slow)
    plan = assumed_plan(corpus_dir, tiny_specs)
    assert plan.break_even_runs is None
    assert plan.is_read_covered is False


def test_without_a_measured_disk_the_forward_passes_alone_count(
    tmp_path, corpus_dir, tiny_specs
) -> None:
    plan = assumed_plan(corpus_dir, tiny_specs, is_disk_measured=False)
    assert (plan.disk.write_bytes_per_s, plan.disk.read_bytes_per_s) == (None, None)
    assert plan.disk.reason
    for part in plan.teachers:
        assert (part.bound_by, part.is_read_covered, part.break_even_runs) == ("forward", None, 1)


def test_an_object_store_has_no_end(corpus_dir, tiny_specs) -> None:
    plan = plan_cache(
        tiny_specs[:1], open_corpus(corpus_dir), "memory://plan/cache", options=OPTIONS
    )
    assert plan.free_bytes is None
    assert plan.disk.write_bytes_per_s is not None


def test_assumed_rates_run_no_teacher(corpus_dir, tiny_specs, monkeypatch) -> None:
    """Nor do they need its weights."""
    monkeypatch.setattr("movekd.analysis.plan.load_teacher", None)
    specs = [tiny_specs[0].with_changes(weights="hub"), tiny_specs[1]]
    plan = assumed_plan(corpus_dir, specs, is_disk_measured=False)
    assert plan.random_weights == ""
    assert all(part.is_assumed for part in plan.teachers)
    assert {part.teacher: part.images_per_s for part in plan.teachers} == {
        "clip": 100.0, "conv": 400.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"clap": 1.0}, r"'clap', which is not among .* clip, conv.* Did you mean 'clip'\?"),
        ({"clip": 0.0}, "'clip' is 0 images/s; give one above 0"),
        ({"clip": math.nan}, "'clip' is nan images/s"),
    ],
)
def test_rates_that_cannot_be_are_refused(corpus_dir, tiny_specs, rates, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_cache(
            tiny_specs, open_corpus(corpus_dir), "none", options=OPTIONS, assumed_rates=rates
        )


def test_shapes_need_no_forward_pass(tiny_specs, tmp_path, monkeypatch) -> None:
    """Of the tiny specs as they are found by running; of a directory, by its config.json."""
    clip = tiny_specs[0]
    expected = {"clip": (16, 144, 144, 4), "conv": (1, 24, None, None)}
    load_teacher(clip).module.save_pretrained(tmp_path / "weights")
    told_by_files = clip.with_changes(weights=str(tmp_path / "weights"), model_args={})
    assert output_shape(told_by_files) == expected["clip"]
    monkeypatch.setattr("movekd.analysis.plan.load_teacher", None)
    assert {spec.name: output_shape(spec) for spec in tiny_specs} == expected


@pytest.mark.parametrize("teacher", shipped_specs())
def test_shapes_of_the_shipped_teachers_are_at_hand(teacher) -> None:
    """As docs say: tokens and channels, and [CLS] where the spec asks for it."""
    spec = load_spec(teacher)
    num_tokens, width, cls_width, num_heads = output_shape(spec)
    tokens = {"clip": 576, "eva02_clip": 576, "eva02": 4096, "sam": 4096}
    tokens |= {"siglip2": 729, "dinov2": 1369}
    channels = {"convnext": 3072, "sam": 256, "pix2struct": 1536, "siglip2": 1152}
    assert (num_tokens, width) == (tokens.get(teacher, 1024), channels.get(teacher, 1024))
    assert (cls_width is not None, num_heads is not None) == (spec.cls, spec.cls_attention)


def test_images_that_cannot_be_read_are_not_measured_with(
    tmp_path, corpus_dir, tiny_specs, known_disk
) -> None:
    data = tmp_path / "data"
    shutil.copytree(corpus_dir, data)
    for number in range(5):
        make_unreadable(data, number)
        ask = {"corpus": open_corpus(data), "cache": tmp_path / "cache", "options": OPTIONS}
        if number < 3:  # one of a batch of four is left
            assert plan_cache(tiny_specs[:1], **ask).teachers[0].images_per_s > 0
        else:
            with pytest.raises(
                CacheError, match=r"first 4 images .* cannot be read .*replace them"
            ):
                plan_cache(tiny_specs[:1], **ask)
