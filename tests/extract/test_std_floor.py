"""The floor under the channels' deviations: sealed once, kept by every later build."""

import json
import shutil

import pytest
import torch

import heavy_tails
from builds import build
from movekd.cache import layout
from movekd.cache.contents import open_contents
from movekd.cache.reader import open_cache
from movekd.cache.spec import DEFAULT_STD_FLOOR, CacheSpec
from movekd.cache.verify import status, verify
from movekd.errors import CacheError, ConfigError

SPEC = heavy_tails.spec(model_args={"rate": 0.02})
"""Channels fire often enough for a corpus of 24 images of 16 tokens."""


@pytest.fixture(scope="module")
def floored(tmp_path_factory, corpus_dir):
    """A cache of a spec that names no floor."""
    out = tmp_path_factory.mktemp("floored") / "cache"
    build(out, corpus_dir, [SPEC.with_changes(calibration_images=6)])
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory, corpus_dir):
    """The same without a floor: byte for byte what caches from before there was one hold."""
    out = tmp_path_factory.mktemp("plain") / "cache"
    build(out, corpus_dir, [SPEC.with_changes(calibration_images=6, std_floor=0.0)])
    return out


def stored_spec(cache) -> dict:
    return json.loads((cache / "heavy.zarr" / "zarr.json").read_text())["attributes"]["movekd"][
        "spec"
    ]


def test_a_new_teacher_has_the_default_floor_and_bounded_targets(floored, plain) -> None:
    with_floor, without = open_cache(floored)["heavy"], open_cache(plain)["heavy"]
    std_D = without.stats.std_D
    floor = DEFAULT_STD_FLOOR * std_D.double().median()
    torch.testing.assert_close(with_floor.stats.std_D, std_D.clamp(min=float(floor)))
    rows = list(range(24))
    largest = [s.read(rows).standardised_BND.abs().max() for s in (with_floor, without)]
    assert largest[0] < 200 < 1_000 < largest[1]
    assert stored_spec(floored)["std_floor"] == DEFAULT_STD_FLOOR
    assert "std_floor" not in stored_spec(plain)
    for cache, share in ((floored, DEFAULT_STD_FLOOR), (plain, 0)):
        assert status(open_contents(cache))[0].std_floor == share
        assert list(verify(cache)) == []


def test_the_lost_bits_show_in_the_limited_error_of_the_seals(floored, plain) -> None:
    with_floor, without = (status(open_contents(cache))[0] for cache in (floored, plain))
    assert without.error_mean < 0.02 < 0.05 < without.error_limited_mean
    assert with_floor.error_limited_mean < without.error_limited_mean / 2


@pytest.mark.parametrize("lost", ["shard", "calibration", "attributes"])
@pytest.mark.parametrize("cache", ["floored", "plain"])
def test_a_later_build_keeps_what_is_sealed(
    tmp_path, request, corpus_dir, snapshot, cache, lost
) -> None:
    expected, out = request.getfixturevalue(cache), tmp_path / "cache"
    shutil.copytree(expected, out)
    files = {
        "shard": layout.seal_name("heavy", 0),
        "calibration": layout.calibration_name("heavy"),
        "attributes": "heavy.zarr/zarr.json",
    }
    (out / files[lost]).unlink()
    asked = SPEC.with_changes(calibration_images=6)
    if cache == "plain" and lost == "calibration":  # nothing tells the floor: it is a new teacher
        asked = asked.with_changes(std_floor=0.0)
    build(out, corpus_dir, [asked])
    assert snapshot(out) == snapshot(expected)


def test_appended_images_are_encoded_with_the_sealed_floor(tmp_path, grown) -> None:
    small, large = grown
    build(tmp_path / "cache", small, [SPEC.with_changes(std_floor=0.0)])
    before = open_cache(tmp_path / "cache")["heavy"].stats
    build(tmp_path / "cache", large, [SPEC])
    after = open_cache(tmp_path / "cache")["heavy"]
    assert torch.equal(after.stats.std_D, before.std_D)
    assert after.is_complete


def test_another_floor_is_refused_by_its_key(corpus_dir, floored, plain) -> None:
    asked = SPEC.with_changes(calibration_images=6)
    for cache, share, found in ((floored, 0.1, 0.25), (plain, 0.25, 0.0)):
        with pytest.raises(CacheError, match=rf"std_floor is {found} in the cache, {share} asked"):
            build(cache, corpus_dir, [asked.with_changes(std_floor=share)])


def test_channel_stats_bring_their_floor(tmp_path, corpus_dir, plain) -> None:
    asked = SPEC.with_changes(calibration_images=6)
    build(tmp_path / "cache", corpus_dir, [asked], channel_stats=plain)
    assert "std_floor" not in stored_spec(tmp_path / "cache")
    std_D = open_cache(tmp_path / "cache")["heavy"].stats.std_D
    assert torch.equal(std_D, open_cache(plain)["heavy"].stats.std_D)


def test_a_spec_without_a_floor_is_the_spec_of_earlier_caches() -> None:
    spec = heavy_tails.spec()
    assert spec.fingerprint == spec.with_changes(std_floor=0.0).fingerprint
    assert "std_floor" not in spec.as_stored()
    assert CacheSpec.model_validate(spec.as_stored()).fingerprint == spec.fingerprint
    assert spec.with_changes(std_floor=0.25).fingerprint != spec.fingerprint
    with pytest.raises(ConfigError, match="std_floor"):
        spec.with_changes(std_floor=1.5)
