"""One Zarr shard in memory: what it refuses, what it leaves out."""

import re

import pyarrow.parquet as pq
import pytest
import torch

from builds import build
from movekd.cache import layout
from movekd.cache.reader import open_cache
from movekd.cache.verify import verify
from movekd.errors import CacheError


def test_a_damaged_image_is_skipped_and_its_neighbours_are_not(
    tmp_path, corpus_dir, tiny_specs, damaged_corpus, undisturbed
) -> None:
    data, damaged = damaged_corpus
    out = tmp_path / "cache"
    whole = open_cache(tmp_path / "undisturbed")
    summaries = build(out, data, tiny_specs)
    cache = open_cache(out)
    key = cache.keys[damaged].as_py()
    others = [row for row in range(24) if row != damaged]
    for summary in summaries:
        store = cache[summary.status.teacher]
        assert list(summary.skipped) == [key]
        table = pq.read_table(out / layout.skipped_name(store.teacher)).to_pylist()
        assert table == [{"row": damaged, "key": key, "reason": summary.skipped[key]}]
        assert list(store.skipped) == [damaged]
        targets = store.read([damaged])
        assert torch.isnan(targets.tokens_BND).all()
        if store.calibration == whole[store.teacher].calibration:
            expected = whole[store.teacher].read(others).stored
            for name, values in store.read(others).stored.items():
                assert torch.equal(values, expected[name])
        else:  # the damaged image was one of the calibration
            assert not torch.isnan(store.read(others).tokens_BND).any()
    assert list(verify(out)) == []


def test_features_beyond_float16_are_refused(tmp_path, corpus_dir, tiny_specs) -> None:
    spec = tiny_specs[0].with_changes(codec="float16", cls=False, mean=(0, 0, 0), std=(1e-9,) * 3)
    conv = tiny_specs[1].with_changes(layer="last")
    huge = spec.with_changes(model_args={**spec.model_args, "initializer_factor": 1e4})
    with pytest.raises(CacheError, match=r"teacher 'clip': a feature is .*65504.*--codec int8"):
        build(tmp_path / "cache", corpus_dir, [huge])
    build(tmp_path / "cache", corpus_dir, [conv])


def test_an_error_above_the_limit_stops_the_build(tmp_path, corpus_dir, tiny_specs, cache_dir):
    worst = open_cache(cache_dir)["clip"].seals[0].error.max
    strict = tiny_specs[0].with_changes(max_error=worst * 0.9)
    with pytest.raises(CacheError, match=r"'clip', rows .*; the spec allows max_error .*float16"):
        build(tmp_path / "cache", corpus_dir, [strict])
    assert open_cache(tmp_path / "cache")["clip"].missing_shards == [0]
    allowed = tiny_specs[0].with_changes(max_error=worst * 1.1)
    build(tmp_path / "cache", corpus_dir, [allowed])  # not another spec: nothing stored differs
    assert list(verify(tmp_path / "cache")) == []


def test_an_energy_error_above_the_limit_stops_the_build(
    tmp_path, corpus_dir, tiny_specs, cache_dir, monkeypatch
):
    store = open_cache(cache_dir)["clip"]
    seal = store.seals[0].error
    # int8 against itself: the sealed figure is what its rows show against float16.
    build(tmp_path / "half", corpus_dir, [tiny_specs[0].with_changes(codec="float16")])
    half = open_cache(tmp_path / "half")["clip"]
    rows = range(*store.seals[0].rows)
    exact, stored = (some.read(rows).standardised_BND.double() for some in (half, store))
    energy = ((stored - exact).square().sum() / exact.square().sum()).item()
    assert seal.energy == pytest.approx(energy, rel=0.02)  # float16 rounds as well
    for module in ("layout", "catalog"):  # a Zarr shard that is full is judged, however small
        monkeypatch.setattr(f"movekd.cache.{module}.MAX_SHARD_ROWS", 24)
    strict = tiny_specs[0].with_changes(max_energy_error=seal.energy * 0.9)
    sentence = r"'clip', Zarr shard 0: .*; the spec allows max_energy_error .*of more bytes"
    with pytest.raises(CacheError, match=sentence):
        build(tmp_path / "cache", corpus_dir, [strict])
    assert open_cache(tmp_path / "cache")["clip"].missing_shards == [0]
    allowed = tiny_specs[0].with_changes(max_energy_error=seal.energy * 1.1)
    build(tmp_path / "cache", corpus_dir, [allowed])  # not another spec: nothing stored differs
    assert list(verify(tmp_path / "cache")) == []


def test_a_rest_of_few_images_above_the_limit_is_told_and_stops_nothing(
    tmp_path, corpus_dir, tiny_specs, cache_dir, capsys
):
    sealed = open_cache(cache_dir)["clip"].seals[0].error.energy
    build(tmp_path / "cache", corpus_dir, [tiny_specs[0].with_changes(max_energy_error=sealed / 2)])
    said = capsys.readouterr().err
    assert re.search(r"'clip', Zarr shard 0: .* max_energy_error .* few images \(24\)", said)
    assert open_cache(tmp_path / "cache")["clip"].seals[0].error.energy == sealed
