"""What is settled before the first Zarr shard: statistics, batch size, dtype."""

import shutil

import pytest
import torch

from builds import OPTIONS, build
from movekd.analysis.verify_features import verify_features
from movekd.cache import layout
from movekd.cache.catalog import update_catalog
from movekd.cache.reader import open_cache
from movekd.cache.storage import open_storage
from movekd.cache.verify import verify
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError
from movekd.extract.calibrate import Variation, calibrate
from movekd.extract.options import BuildContext, BuildOptions
from movekd.teachers import load_teacher


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 7), ("calibration_images", 5), ("codec", "float16"), ("weights", "hub")],
)
def test_another_spec_is_refused_by_its_key(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot, key, value
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache_dir, out)
    changed = tiny_specs[0].with_changes(**{key: value})
    with pytest.raises(CacheError, match=rf"'clip' in .* another spec: {key} .*--overwrite"):
        build(out, corpus_dir, [changed])
    assert snapshot(out) == snapshot(cache_dir)


def test_calibration_does_not_depend_on_the_order_of_the_corpus(tmp_path, crops, tiny_specs):
    """Equal up to the last bits: statistics of other batches are summed in another order."""
    stats = []
    for order in (1, -1):
        images = tmp_path / f"images{order}"
        images.mkdir()
        for number, crop in enumerate(crops[:20][::order]):
            crop.save(images / f"{number:02d}.png")
        pack_folder(images, tmp_path / f"data{order}", num_workers=1)
        out = tmp_path / f"cache{order}"
        build(out, tmp_path / f"data{order}", tiny_specs[:1])
        stats.append(open_cache(out)["clip"].stats)
    torch.testing.assert_close(stats[0].mean_D, stats[1].mean_D)
    torch.testing.assert_close(stats[0].std_D, stats[1].std_D)


TEACHERS = ["clip", "eva02", "convnext", "sam", "siglip2", "dinov2", "dinov3", "radio"]


@pytest.mark.parametrize(
    "name", [*TEACHERS[:4:3], *(pytest.param(n, marks=pytest.mark.slow) for n in TEACHERS)]
)
def test_preprocessing_in_the_wrong_unit_is_said(tmp_path, corpus_dir, shrunken, capsys, name):
    """A mean and std for levels of 0 to 255, as OpenCV's users have them."""
    spec = shrunken(name, calibration_images=12)
    wrong = {key: tuple(255 * value for value in getattr(spec, key)) for key in ("mean", "std")}
    storage, corpus = open_storage(tmp_path), open_corpus(corpus_dir)
    catalog = update_catalog(storage, corpus, "crop")
    context = BuildContext(storage, corpus, catalog, OPTIONS, lambda *_: None)
    calibrate(context, spec, load_teacher(spec))
    assert capsys.readouterr().err == ""
    spec = spec.model_copy(update=wrong)
    calibrate(context, spec, load_teacher(spec))
    said = capsys.readouterr().err
    assert f"{name}: the features of different images differ by only 0." in said
    assert "divide values for 0 to 255 by 255" in said
    assert said.count("\n") == 1


def test_variation_is_between_images_and_not_between_positions() -> None:
    positions_1ND = torch.randn(1, 9, 4, generator=torch.manual_seed(0))
    noise_BND = torch.randn(200, 9, 4, generator=torch.manual_seed(1))
    for scale in (0.0, 0.01, 1.0):
        variation = Variation()
        for part in (positions_1ND + scale * noise_BND).split(70):
            variation.add(part)
        expected = scale / (positions_1ND.square().mean() + scale**2).sqrt()
        assert variation.result() == pytest.approx(float(expected), rel=0.4, abs=1e-6)
    assert Variation().result() == 1.0


def test_resume_keeps_the_batch_size_of_the_calibration(
    tmp_path, corpus_dir, tiny_specs, cache_dir, snapshot
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(cache_dir, out)
    (out / layout.seal_name("clip", 0)).unlink()
    build(out, corpus_dir, tiny_specs, options=BuildOptions(batch_size=3, num_workers=0))
    assert snapshot(out) == snapshot(cache_dir)


def test_resume_and_recompute_keep_the_dtype_of_the_calibration(
    tmp_path, corpus_dir, tiny_specs, snapshot
) -> None:
    half = BuildOptions(dtype=torch.bfloat16, batch_size=5, num_workers=0)
    build(tmp_path / "half", corpus_dir, tiny_specs[:1], options=half)
    expected = snapshot(tmp_path / "half")
    (tmp_path / "half" / layout.seal_name("clip", 0)).unlink()
    build(tmp_path / "half", corpus_dir, tiny_specs[:1], options=OPTIONS)
    assert snapshot(tmp_path / "half") == expected
    assert open_cache(tmp_path / "half")["clip"].calibration.dtype == "bfloat16"
    assert (
        list(verify_features(tmp_path / "half", open_corpus(corpus_dir), 24, options=OPTIONS)) == []
    )


def test_channel_statistics_of_another_cache_are_taken_over(
    tmp_path, corpus_dir, grown, tiny_specs, cache_dir
) -> None:
    small, _ = grown
    build(tmp_path / "part", small, tiny_specs, channel_stats=cache_dir)
    build(tmp_path / "part", small, tiny_specs, channel_stats=cache_dir)
    whole, part = open_cache(cache_dir), open_cache(tmp_path / "part")
    for teacher in whole:
        assert part[teacher].calibration == whole[teacher].calibration
        assert torch.equal(part[teacher].stats.mean_D, whole[teacher].stats.mean_D)
    assert list(verify(tmp_path / "part")) == []
    own = tmp_path / "own"
    build(own, small, tiny_specs[:1])
    with pytest.raises(CacheError, match=r"other channel statistics than those of --channel-stats"):
        build(own, small, tiny_specs[:1], channel_stats=cache_dir)
    with pytest.raises(CacheError, match="another spec: seed is 0 in the cache, 7 asked"):
        build(own, small, [tiny_specs[0].with_changes(seed=7)], channel_stats=cache_dir,
              replace=True)  # fmt: skip
    assert open_cache(own)["clip"].is_complete  # refused before anything was deleted
    with pytest.raises(CacheError, match="holds no calibration of 'conv'"):
        build(own, small, tiny_specs, channel_stats=own)
    with pytest.raises(
        CacheError, match=r"geometry 'crop', the build asks for 'pad'.*channel-stats"
    ):
        build(tmp_path / "pad", small, tiny_specs, channel_stats=cache_dir, geometry="pad")


def test_a_batch_size_that_was_found_is_sealed(tmp_path, corpus_dir, tiny_specs, snapshot) -> None:
    auto = BuildOptions(batch_size=None, num_workers=0)
    build(tmp_path / "auto", corpus_dir, tiny_specs, options=auto)
    sealed = open_cache(tmp_path / "auto")["clip"].calibration.batch_size
    assert sealed == 8
    given = BuildOptions(batch_size=sealed, num_workers=0)
    build(tmp_path / "given", corpus_dir, tiny_specs, options=given)
    assert snapshot(tmp_path / "auto") == snapshot(tmp_path / "given")
