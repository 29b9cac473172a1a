"""Legend: B batch, N tokens, D channels, H heads."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from corpus_files import make_unreadable
from movekd.analysis.fidelity import draw_images, measure_fidelity
from movekd.analysis.kd_gradient import KDGradient, LossTargets
from movekd.cache.codecs import codec, codec_names
from movekd.cache.codecs.int8 import Int8
from movekd.cache.grid import resize_attention, resize_tokens
from movekd.cache.layout import teacher_layout
from movekd.cache.stats import StatsAccumulator
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError
from movekd.extract.image_loader import image_transform
from movekd.extract.options import BuildOptions
from movekd.teachers import load_teacher

OPTIONS = BuildOptions(batch_size=5, num_workers=0)
GRADIENTS = ("revised_untrained", "revised_near", "official_untrained", "official_near")


def measure(data, spec, *, options=OPTIONS, **more):
    asked = {"num_images": 8, "student_grid": 3, "student_width": 32} | more
    return measure_fidelity(spec, open_corpus(data), geometry="crop", options=options, **asked)


def by_way(report):
    return {(way.codec, way.grid): way for way in report.ways}


@pytest.fixture(scope="module")
def report(corpus_dir, tiny_specs):
    return measure(corpus_dir, tiny_specs[0])


@pytest.fixture(scope="module")
def live(corpus_dir, tiny_specs):
    """What the clip teacher says about the images measured with, and its channel statistics."""
    corpus, spec = open_corpus(corpus_dir), tiny_specs[0]
    teacher, transform = load_teacher(spec), image_transform(tiny_specs[0], "crop")

    def run(images):
        pixels = [torch.from_numpy(transform(corpus.read_image(image))) for image in images]
        return teacher.forward(torch.stack(pixels))

    calibration, images = draw_images(corpus, 12, 8)
    statistics = StatsAccumulator()
    statistics.add(run(calibration).tokens_BND)
    output = run(images)
    keys = [corpus.index["key"][int(image)].as_py() for image in images]
    attention_B1N = output.cls_attention_BHN.mean(1, keepdim=True)
    return keys, output.tokens_BND.clone(), attention_B1N, statistics.result()


def test_every_codec_and_grid_stands_side_by_side(report, corpus_dir, tiny_specs) -> None:
    ways = [(name, grid) for grid in (4, 3) for name in codec_names()]
    assert list(by_way(report)) == ways
    assert [way for way, found in by_way(report).items() if found.is_spec] == [("int8", 4)]
    assert (report.teacher, report.num_images, report.random_weights) == ("clip", 8, True)
    assert (report.calibration_images, report.shared_images) == (12, 0)
    assert (dict(report.skipped), dict(report.refused)) == ({}, {})
    for name, grid in ways:
        layout = teacher_layout(name, grid**2, 144, cls_width=144, num_heads=1)
        assert by_way(report)[name, grid].row_bytes == layout.row_bytes
    conv = measure(corpus_dir, tiny_specs[1])
    assert list(by_way(conv)) == [(n, grid) for grid in (1, 3, 2) for n in codec_names()]
    assert [(way.codec, way.grid) for way in conv.ways if way.is_spec] == [("float16", 2)]


def test_float16_loses_next_to_nothing(report, corpus_dir, tiny_specs) -> None:
    for way in (by_way(report)["float16", 4], by_way(report)["float16", 3]):
        assert way.error_max < 1e-3
        assert way.token_cosine > 0.999999
        assert way.attention_l1 < 1e-3
        for name in GRADIENTS:
            cosine = getattr(way, name)
            assert cosine is None or cosine.mean >= cosine.worst > 0.99999


@pytest.mark.parametrize("name", ["float16", "int8"])
def test_errors_are_the_codecs(report, live, name) -> None:
    _, tokens_BND, attention_BHN, stats = live
    way = by_way(report)[name, 4]
    stored = codec(name).encode(tokens_BND, stats)
    errors = codec(name).error(tokens_BND, stored, stats)
    assert way.error_mean == pytest.approx(errors.sum.item() / (8 * 16), rel=1e-3)
    assert way.error_max == pytest.approx(errors.max.item(), rel=1e-3)
    assert way.error_limited_mean == pytest.approx(errors.limited_sum.item() / (8 * 16), rel=1e-3)
    assert way.error_limited_max == pytest.approx(errors.limited_max.item(), rel=1e-3)
    decoded_BND, exact_BND = (
        codec(name).decode_standardised(stored, stats),
        stats.standardise(tokens_BND),
    )
    cosine_BN = torch.nn.functional.cosine_similarity(
        decoded_BND.double(), exact_BND.double(), dim=-1
    )
    assert 1 - way.token_cosine == pytest.approx(1 - cosine_BN.mean().item(), rel=1e-2)
    l1_BH = (attention_BHN.half().float() - attention_BHN).abs().sum(-1)
    assert way.attention_l1 == pytest.approx(l1_BH.mean().item(), rel=1e-3)


@pytest.mark.parametrize("name", ["float16", "int8"])
def test_gradients_are_compared_image_by_image(report, live, name) -> None:
    """On the student's grid for the revised recipe, on the native one for the official."""
    keys, tokens_BND, attention_BHN, stats = live
    stored = codec(name).encode(tokens_BND, stats)
    exact, decoded = (
        LossTargets(resize_tokens(standardised, 3), raw, resize_attention(attention, 3))
        for standardised, raw, attention in (
            (stats.standardise(tokens_BND), tokens_BND, attention_BHN),
            (
                codec(name).decode_standardised(stored, stats),
                codec(name).decode(stored, stats),
                attention_BHN.half().float(),
            ),
        )
    )
    gradient = KDGradient(9, 32, 16, 144)
    expected, found = gradient.all(keys, exact, exact), gradient.all(keys, decoded, exact)
    for what in GRADIENTS:
        cosines = [
            torch.dot(a.double().flatten(), b.double().flatten())
            / (a.double().norm() * b.double().norm())
            for a, b in zip(found[what], expected[what], strict=True)
        ]
        cosine = getattr(by_way(report)[name, 4], what)
        assert 1 - cosine.mean == pytest.approx(1 - float(np.mean(cosines)), rel=0.05, abs=1e-9)
        assert 1 - cosine.worst == pytest.approx(1 - float(min(cosines)), rel=0.05, abs=1e-9)


def test_a_coarser_codec_shows_in_every_figure(corpus_dir, tiny_specs, monkeypatch) -> None:
    """And most of all at a student that has learned."""
    encode, reports = Int8.encode, []

    def coarse(step, int8, tokens_BND, stats):
        stored = encode(int8, tokens_BND, stats)
        rounded = (stored["tokens"].float() / step).round() * step
        stored["tokens"] = rounded.clamp(-127, 127).to(torch.int8)
        return stored

    for step in (1, 8, 32):
        monkeypatch.setattr(Int8, "encode", lambda *given, step=step: coarse(step, *given))
        reports.append(by_way(measure(corpus_dir, tiny_specs[0]))["int8", 4])
    for finer, coarser in itertools.pairwise(reports):
        assert finer.error_mean < coarser.error_mean
        assert finer.token_cosine > coarser.token_cosine
        for name in GRADIENTS:
            assert getattr(finer, name).mean > getattr(coarser, name).mean
            assert getattr(finer, name).worst > getattr(coarser, name).worst
    for way in reports:
        assert way.revised_near.mean < way.revised_untrained.mean
        assert way.official_near.mean < way.official_untrained.mean


def test_the_same_command_says_the_same(report, corpus_dir, tiny_specs) -> None:
    assert measure(corpus_dir, tiny_specs[0]) == report
    workers = BuildOptions(batch_size=5, num_workers=1)
    assert measure(corpus_dir, tiny_specs[0], options=workers) == report
    other = BuildOptions(batch_size=3, num_workers=0)
    for found, way in zip(
        measure(corpus_dir, tiny_specs[0], options=other).ways, report.ways, strict=True
    ):
        assert found.error_mean == pytest.approx(way.error_mean, rel=1e-3)
        assert found.revised_near.mean == pytest.approx(way.revised_near.mean, abs=1e-5)


def test_what_a_teacher_or_grid_has_not_is_none(report, corpus_dir, tiny_specs) -> None:
    for (_, grid), way in by_way(report).items():
        assert (way.official_untrained is None) == (way.official_near is None) == (grid != 4)
    conv = measure(corpus_dir, tiny_specs[1])
    assert all(way.attention_l1 is None for way in conv.ways)
    silent = measure(corpus_dir, tiny_specs[0].with_changes(cls_attention=False))
    assert all(way.attention_l1 is None for way in silent.ways)
    same_grid = measure(corpus_dir, tiny_specs[0], student_grid=4)
    found = [(way.grid, way.official_near is None) for way in same_grid.ways]
    assert found == [(4, False)] * len(codec_names())


def test_the_images_are_the_next_after_the_builds(corpus_dir) -> None:
    corpus = open_corpus(corpus_dir)
    by_key = np.argsort(corpus.index["key"].to_pylist()).tolist()
    for num_calibration, num_images, first in ((12, 8, 12), (12, 12, 12), (20, 8, 16), (12, 99, 0)):
        calibration, images = draw_images(corpus, num_calibration, num_images)
        assert calibration.tolist() == sorted(by_key[:num_calibration])
        assert images.tolist() == sorted(by_key[first : first + num_images])


def test_images_used_twice_are_counted(corpus_dir, tiny_specs) -> None:
    report = measure(corpus_dir, tiny_specs[0].with_changes(calibration_images=20))
    assert (report.num_images, report.calibration_images, report.shared_images) == (8, 20, 4)


def test_unreadable_images_are_left_out_and_named(damaged_corpus, tiny_specs) -> None:
    data, damaged = damaged_corpus
    report = measure(data, tiny_specs[0], num_images=24)
    assert report.num_images == 23
    assert list(report.skipped) == [open_corpus(data).index["key"][damaged].as_py()]


def test_no_readable_image_is_said(damaged_corpus, tiny_specs) -> None:
    data, damaged = damaged_corpus
    keys = open_corpus(data).index["key"].to_pylist()
    before = sorted(keys).index(keys[damaged])
    spec = tiny_specs[0].with_changes(calibration_images=before)
    with pytest.raises(CacheError, match=r"none of 1 images of .* can be read"):
        measure(data, spec, num_images=1)


def test_a_codec_that_cannot_hold_the_features_is_named(corpus_dir, tiny_specs) -> None:
    spec = tiny_specs[0].with_changes(cls=False, mean=(0, 0, 0), std=(1e-9,) * 3)
    huge = spec.with_changes(model_args={**spec.model_args, "initializer_factor": 1e4})
    report = measure(corpus_dir, huge)
    others = [name for name in codec_names() if name != "float16"]
    assert list(by_way(report)) == [(name, grid) for grid in (4, 3) for name in others]
    assert list(report.refused) == ["float16 on 4x4", "float16 on 3x3"]
    assert "beyond float16's 65504" in report.refused["float16 on 4x4"]


def test_an_interruption_goes_through(corpus_dir, tiny_specs) -> None:
    seen = []

    def interrupt(what, done, total):
        seen.append((what, done, total))
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(corpus_dir, tiny_specs[0], progress=interrupt)
    calibrate = [("clip: calibrate", done, 12) for done in (5, 10, 12)]
    assert seen == [*calibrate, ("clip: measure", 5, 8)]


def test_figures_are_frozen(report) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.ways[0].error_mean = 0.0


def test_nothing_to_measure_with_is_said(tmp_path, crops, tiny_specs) -> None:
    (tmp_path / "images").mkdir()
    crops[0].save(tmp_path / "images" / "one.png")
    pack_folder(tmp_path / "images", tmp_path / "data", num_workers=1)
    make_unreadable(tmp_path / "data", 0)
    with pytest.raises(CacheError, match="no image of the calibration could be read"):
        measure(tmp_path / "data", tiny_specs[0])
