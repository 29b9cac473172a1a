"""Builds of base views and tiles, from the corpus to what reads the cache."""

import itertools
import shutil

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from corpus_files import make_unreadable
from movekd.analysis.fidelity import measure_fidelity
from movekd.analysis.plan import plan_cache
from movekd.analysis.verify_features import verify_features
from movekd.cache.reader import open_cache
from movekd.cache.stats import StatsAccumulator
from movekd.cache.verify import verify
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, UnknownKeyError
from movekd.extract.image_loader import image_transform, pixel_batches
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.teachers import load_teacher

OPTIONS = BuildOptions(batch_size=5, num_workers=0)
VIEWS = [3, 5, 4, 4, 3, 3, 5, 5, 3]
"""How many views the images of ``view_corpora`` have."""


def build(out, data, specs, *, views="anyres", options=OPTIONS, **more):
    more = {"geometry": "stretch", "views": views, "options": options} | more
    return list(build_cache(out, open_corpus(data), specs, **more))


@pytest.fixture
def specs(tiny_specs):
    """The tiny teachers, calibrated on four of the images."""
    return [spec.with_changes(calibration_images=4) for spec in tiny_specs]


@pytest.fixture(scope="module")
def anyres_dir(tmp_path_factory, view_corpora, tiny_specs):
    """A complete cache of the smaller of ``view_corpora``."""
    out = tmp_path_factory.mktemp("anyres") / "cache"
    build(out, view_corpora[0], [spec.with_changes(calibration_images=4) for spec in tiny_specs])
    return out


def inputs(corpus, spec, views):
    """Return the teacher's input for some (image, view)."""
    transform = image_transform(spec, "stretch")
    pixels = [transform(corpus.read_image(image), view) for image, view in views]
    return torch.from_numpy(np.stack(pixels))


def test_what_is_stored_is_what_the_teacher_says_of_each_view(
    anyres_dir, view_corpora, specs
) -> None:
    corpus, cache, spec = open_corpus(view_corpora[0]), open_cache(anyres_dir), specs[0]
    asked = [(image, view) for image in range(7) for view in range(VIEWS[image])]
    keys = corpus.index["key"].to_pylist()
    rows = [int(cache.rows([keys[image]], view)[0]) for image, view in asked]
    store = cache[spec.name]
    output = load_teacher(spec).forward(inputs(corpus, spec, asked))
    exact_BND = store.stats.standardise(output.tokens_BND)
    stored_BND = store.read(rows).standardised_BND
    error_BN = (stored_BND - exact_BND).norm(dim=-1) / exact_BND.norm(dim=-1)
    assert error_BN.max().item() <= store.seals[0].error.max * 1.01
    neighbour_BND = exact_BND.roll(1, 0)
    others_BN = (stored_BND - neighbour_BND).norm(dim=-1) / neighbour_BND.norm(dim=-1)
    assert others_BN.amax(dim=1).min().item() > 2 * error_BN.max().item()


def test_views_are_found_by_name(anyres_dir) -> None:
    cache = open_cache(anyres_dir)
    names = [f"{number}.png" for number in range(7)]
    starts = [0, *itertools.accumulate(VIEWS[:6])]
    assert (cache.views, cache.geometry) == ("anyres", "stretch")
    assert len(cache.keys) == 7
    assert cache.rows(names).tolist() == cache.rows(cache.keys.to_pylist()).tolist() == starts
    assert cache.rows(names, view=2).tolist() == [start + 2 for start in starts]
    expected = [start + 3 if count > 3 else -1 for start, count in zip(starts, VIEWS, strict=False)]
    assert cache.find_rows([*names, "nothing"], view=3).tolist() == [*expected, -1]
    assert cache.find_rows(names, view=9).tolist() == [-1] * 7
    with pytest.raises(
        UnknownKeyError, match=r"no view 3 of '0.png' \.\.\. \(3 images\).*'anyres'"
    ):
        cache.rows([*names, "0.png"], view=3)
    with pytest.raises(UnknownKeyError, match=r"no image named 'nothing' \(1 of 8 unknown\)"):
        cache.rows([*names, "nothing"], view=3)


def test_stock_readers_see_rows_of_views(anyres_dir) -> None:
    rows = [4, 26, 0]  # a tile, the last row, a base view
    for name, store in ((name, open_cache(anyres_dir)[name]) for name in ("clip", "conv")):
        expected = store.read(rows).stored["tokens"].numpy()
        found = zarr.open_group(anyres_dir / f"{name}.zarr", mode="r")["tokens"]
        assert found.shape[0] == 27
        np.testing.assert_array_equal(found[:][rows], expected)
        path = str(anyres_dir / f"{name}.zarr" / "tokens")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        stock = tensorstore.open(spec).result()
        np.testing.assert_array_equal(stock[:].read().result()[rows], expected)


def test_a_base_cache_has_no_tiles(cache_dir) -> None:
    with pytest.raises(UnknownKeyError, match=r"no view 1 of 'photos/03.png' \(1 images\).*'base'"):
        open_cache(cache_dir).rows(["photos/03.png"], view=1)


def test_verify_and_recompute_pass_and_find_swapped_views(
    tmp_path, anyres_dir, view_corpora, specs
) -> None:
    assert list(verify(anyres_dir)) == []
    corpus = open_corpus(view_corpora[0])
    assert list(verify_features(anyres_dir, corpus, 27, options=OPTIONS)) == []
    shutil.copytree(anyres_dir, tmp_path / "cache")
    tokens = zarr.open_group(tmp_path / "cache" / "clip.zarr", mode="r+")["tokens"]
    tokens[3:5] = tokens[3:5][::-1]  # base view and first tile of the second image
    problems = list(
        verify_features(tmp_path / "cache", corpus, 27, options=OPTIONS, teachers=["clip"])
    )
    assert len(problems) == 2
    assert all(f"row {row} " in problem for row, problem in zip((3, 4), problems, strict=True))


def test_calibration_is_over_all_views_of_its_images(anyres_dir, view_corpora, specs) -> None:
    corpus, store = open_corpus(view_corpora[0]), open_cache(anyres_dir)["clip"]
    keys = corpus.index["key"].to_pylist()
    chosen = sorted(range(7), key=keys.__getitem__)[:4]
    asked = [(image, view) for image in sorted(chosen) for view in range(VIEWS[image])]
    statistics = StatsAccumulator()
    statistics.add(load_teacher(specs[0]).forward(inputs(corpus, specs[0], asked)).tokens_BND)
    assert store.calibration.num_images == 4
    torch.testing.assert_close(store.stats.mean_D, statistics.result().mean_D)
    torch.testing.assert_close(store.stats.std_D, statistics.result().std_D)


def test_an_append_touches_nothing_sealed(
    tmp_path, view_corpora, specs, small_shards, snapshot
) -> None:
    small, large = view_corpora
    build(tmp_path, small, specs)
    before = snapshot(tmp_path)
    summaries = build(tmp_path, large, specs)
    assert [s.images_built for s in summaries] == [8, 8]  # of two images
    assert [(s.status.images, s.status.rows) for s in summaries] == [(9, 35), (9, 35)]
    after = snapshot(tmp_path)
    assert all(
        after[name] == content
        for name, content in before.items()
        if "/c/" in name or name.split("/")[-1][:5].isdecimal()  # Zarr shards and their seals
    )
    cache = open_cache(tmp_path)
    assert cache.rows(["7.png", "8.png"]).tolist() == [32, 37]
    assert cache.rows(["8.png"], view=2).tolist() == [39]
    with pytest.raises(CacheError, match=r"row 28 .*stands for no image"):
        cache["clip"].read([28])
    assert list(verify(tmp_path)) == []
    again = build(tmp_path, large, specs)
    assert [s.images_built for s in again] == [0, 0]
    assert snapshot(tmp_path) == after


def test_interrupted_and_run_again_equals_undisturbed(
    tmp_path, view_corpora, specs, small_shards, snapshot
) -> None:
    calls = 0

    def interrupt(what, done, total):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt

    limit = 0
    build(tmp_path / "undisturbed", view_corpora[1], specs, progress=interrupt)
    undisturbed, total = snapshot(tmp_path / "undisturbed"), calls
    for number, limit in enumerate((2, total // 3, total // 2, total - 1)):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / f"{number}", view_corpora[1], specs, progress=interrupt)
        assert snapshot(tmp_path / f"{number}") != undisturbed
        limit = 0
        build(tmp_path / f"{number}", view_corpora[1], specs)
        assert snapshot(tmp_path / f"{number}") == undisturbed


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_is_decoded_once_for_views_asked_for_in_turn(
    view_corpora, specs, num_workers, monkeypatch
) -> None:
    corpus, transform = open_corpus(view_corpora[0]), image_transform(specs[0], "stretch")
    decoded = []
    if num_workers == 0:
        from movekd.extract import image_loader

        decode = image_loader.decode_image
        monkeypatch.setattr(
            image_loader, "decode_image", lambda data: decoded.append(data) or decode(data)
        )
    batches, views = [[1, 1, 1, 2], [2, 0]], [[0, 1, 4, 0], [3, 0]]
    found = list(pixel_batches(corpus, transform, batches, views=views, num_workers=num_workers))
    assert len(decoded) == (3 if num_workers == 0 else 0)
    for batch, images_of, views_of in zip(found, batches, views, strict=True):
        assert batch.images == images_of
        expected = inputs(corpus, specs[0], zip(images_of, views_of, strict=True))
        assert torch.equal(batch.pixels("cpu"), expected)


def test_an_unreadable_image_is_skipped_in_all_its_views(tmp_path, view_corpora, specs) -> None:
    shutil.copytree(view_corpora[0], tmp_path / "data")
    key = make_unreadable(tmp_path / "data", 2)
    (summary,) = build(tmp_path / "cache", tmp_path / "data", specs[:1])
    assert list(summary.skipped) == [key]
    assert summary.status.skipped == 4
    cache = open_cache(tmp_path / "cache")
    assert sorted(cache["clip"].skipped) == [8, 9, 10, 11]
    assert list(verify(tmp_path / "cache")) == []


def test_other_views_than_the_caches_are_refused(tmp_path, anyres_dir, view_corpora, specs) -> None:
    with pytest.raises(CacheError, match=r"views 'anyres', the build asks for 'base'.*--tiles"):
        build(anyres_dir, view_corpora[0], specs, views="base")


def test_fidelity_measures_the_tiles_as_well(view_corpora, specs) -> None:
    corpus = open_corpus(view_corpora[0])
    asked = {"num_images": 2, "student_grid": 3, "student_width": 32, "options": OPTIONS}
    counts = {}
    for views in ("base", "anyres"):
        seen = []
        report = measure_fidelity(
            specs[0], corpus, geometry="stretch", views=views, **asked,
            progress=lambda what, done, total, seen=seen: seen.append((what, total)),
        )  # fmt: skip
        assert (report.num_images, report.views) == (2, views)
        counts[views] = dict(seen)["clip: measure"]
    assert counts["base"] == 2
    assert counts["anyres"] in {VIEWS[i] + VIEWS[j] for i in range(7) for j in range(i)}


def test_a_plan_counts_views(tmp_path, view_corpora, specs) -> None:
    corpus = open_corpus(view_corpora[0])
    asked = {"options": OPTIONS, "assumed_rates": {"clip": 10.0}, "is_disk_measured": False}
    base, anyres, scaled = (
        plan_cache(specs[:1], corpus, tmp_path, views=views, num_images=number, **asked)
        for views, number in (("base", None), ("anyres", None), ("anyres", 700))
    )
    assert [plan.num_rows for plan in (base, anyres, scaled)] == [7, 27, 2700]
    assert [plan.num_images for plan in (base, anyres, scaled)] == [7, 7, 700]
    assert anyres.total_bytes * 7 == base.total_bytes * 27
    assert anyres.hours == pytest.approx(base.hours * 27 / 7)
    assert anyres.read_bytes_per_s == base.read_bytes_per_s  # a run reads base views
    assert (base.break_even_runs, anyres.break_even_runs) == (1, 4)
