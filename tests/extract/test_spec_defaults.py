"""Heads of the [CLS] attention: the mean for new teachers, what the cache has for sealed ones."""

import json
import shutil

import pytest
import torch

from builds import build
from movekd.cache import layout
from movekd.cache.layout import teacher_layout
from movekd.cache.reader import open_cache
from movekd.cache.spec import DEFAULT_STD_FLOOR, CacheSpec, load_spec
from movekd.cache.storage import open_storage
from movekd.cache.verify import verify
from movekd.distill.kd import kd_loss
from movekd.distill.weighting import token_weights
from movekd.errors import CacheError, ConfigError
from movekd.extract.spec_defaults import with_defaults

HALF = 2**-11
"""Relative rounding of float16."""


@pytest.fixture(scope="module")
def all_heads(tmp_path_factory, corpus_dir, tiny_specs):
    """A cache as earlier versions made it: all heads, and no key that says so."""
    out = tmp_path_factory.mktemp("heads") / "cache"
    build(out, corpus_dir, [tiny_specs[0].with_changes(cls_attention_heads="all")])
    stored = json.loads((out / "clip.zarr" / "zarr.json").read_text())["attributes"]["movekd"]
    assert "cls_attention_heads" not in stored["spec"]
    return out


def test_the_mean_over_heads_is_stored(cache_dir, all_heads) -> None:
    mean, every = open_cache(cache_dir)["clip"], open_cache(all_heads)["clip"]
    assert (mean.calibration.num_heads, every.calibration.num_heads) == (1, 4)
    assert mean.spec.cls_attention_heads == "mean"
    stored, heads = mean.read(range(24)), every.read(range(24))
    # Taken in float32 and rounded once; the heads were rounded one by one.
    torch.testing.assert_close(
        stored.cls_attention_BHN, heads.cls_attention_BHN.mean(1, keepdim=True), rtol=2 * HALF,
        atol=2**-24,
    )  # fmt: skip
    for name in ("tokens", "token_scale", "cls"):
        assert torch.equal(stored.stored[name], heads.stored[name])
    assert every.layout.row_bytes - mean.layout.row_bytes == 3 * 16 * 2


def test_clip_saves_seventeen_kilobytes_per_row() -> None:
    """CLIP ViT-L/14-336: 16 heads of 576 tokens take 18 KB, their mean 1 KB."""
    rows = [
        teacher_layout("int8", 576, 1024, cls_width=1024, num_heads=heads).row_bytes
        for heads in (16, 1)
    ]
    assert rows[0] - rows[1] == 15 * 576 * 2


@pytest.mark.parametrize("kind", ["softmax", "blend"])
def test_loss_and_gradient_are_those_of_all_heads_up_to_rounding(
    cache_dir, all_heads, kind
) -> None:
    """The mean a' of stored heads and the stored mean a differ by at most 2 roundings of float16.

    So the weights differ by a factor of at most 1 + 6 roundings: numerator, denominator, and the
    renormalisation of `blend`, each with at most 2.
    """
    rows = range(24)
    found = [open_cache(cache)["clip"].read(rows) for cache in (all_heads, cache_dir)]
    combine = "sum" if kind == "softmax" else "mean"
    results = []
    for targets in found:
        weights_BN = token_weights(targets.cls_attention_BHN, kind)
        generator = torch.Generator().manual_seed(0)
        student_BND = torch.randn(targets.tokens_BND.shape, generator=generator, requires_grad=True)
        shares_BT = torch.ones(24, 1)
        terms = kd_loss(
            [student_BND], [targets.standardised_BND], shares_BT, weights_BN, combine=combine
        )
        loss = terms.total_B.mean()
        loss.backward()
        results.append((loss.detach(), student_BND.grad))
    (loss, gradient), (other_loss, other_gradient) = results
    bound = 6 * HALF
    assert abs(loss - other_loss) <= bound * loss
    assert bool(((gradient - other_gradient).abs() <= bound * gradient.abs() + 1e-12).all())
    assert not torch.equal(gradient, other_gradient)  # the test sees the difference


@pytest.mark.parametrize(
    ("heads", "lost"),
    [("all", "shard"), ("all", "calibration"), ("all", "attributes"), ("mean", "attributes")],
)
def test_a_later_build_keeps_what_is_sealed(
    tmp_path, corpus_dir, tiny_specs, snapshot, all_heads, cache_dir, heads, lost
) -> None:
    out, source = tmp_path / "cache", all_heads if heads == "all" else cache_dir
    shutil.copytree(source, out)
    before = snapshot(out)
    files = {
        "shard": layout.seal_name("clip", 0),
        "calibration": layout.calibration_name("clip"),
        "attributes": "clip.zarr/zarr.json",
    }
    (out / files[lost]).unlink()
    asked = tiny_specs[0]
    if lost == "calibration" and heads == "all":  # nothing says it: it is a new teacher
        asked = asked.with_changes(cls_attention_heads="all")
    build(out, corpus_dir, [asked])
    assert snapshot(out) == before


def test_appended_images_have_the_sealed_heads(tmp_path, grown, tiny_specs, small_shards) -> None:
    small, large = grown
    out, spec = tmp_path / "cache", tiny_specs[0]
    build(out, small, [spec.with_changes(cls_attention_heads="all")])
    build(out, large, [spec])
    store = open_cache(out)["clip"]
    assert store.is_complete
    assert store.read([0, 16]).cls_attention_BHN.shape == (2, 4, 16)
    assert list(verify(out)) == []
    with pytest.raises(CacheError, match="cls_attention_heads is 'all' in the cache, 'mean' asked"):
        build(out, large, [spec.with_changes(cls_attention_heads="mean")])


def test_channel_stats_bring_their_heads(tmp_path, corpus_dir, tiny_specs, all_heads) -> None:
    build(tmp_path / "cache", corpus_dir, tiny_specs[:1], channel_stats=all_heads)
    assert open_cache(tmp_path / "cache")["clip"].calibration.num_heads == 4


def test_a_spec_without_the_key_is_the_spec_of_earlier_caches(tiny_specs, all_heads) -> None:
    spec, convolutional = tiny_specs
    every = spec.with_changes(cls_attention_heads="all")
    assert spec.fingerprint == every.fingerprint
    assert spec.with_changes(cls_attention_heads="mean").fingerprint != spec.fingerprint
    assert "cls_attention_heads" not in every.as_stored()
    # Without attention the key says nothing.
    assert (
        convolutional.with_changes(cls_attention_heads="mean").fingerprint
        == convolutional.fingerprint
    )
    assert CacheSpec.model_validate(spec.as_stored()).stored_heads == "all"
    with pytest.raises(ConfigError, match="cls_attention_heads"):
        spec.with_changes(cls_attention_heads="first")


def test_keys_that_are_named_stay_and_others_are_settled(tiny_specs, all_heads) -> None:
    spec, convolutional = tiny_specs
    new = with_defaults(spec)
    assert (new.std_floor, new.cls_attention_heads) == (DEFAULT_STD_FLOOR, "mean")
    assert with_defaults(convolutional).cls_attention_heads is None
    named = spec.with_changes(std_floor=0.5, cls_attention_heads="mean")
    assert with_defaults(named) == named
    sealed = with_defaults(spec, own=open_storage(all_heads))
    assert (sealed.std_floor, sealed.cls_attention_heads) == (DEFAULT_STD_FLOOR, "all")
    # Of a calibration of another spec the keys are taken; the build refuses by what differs.
    other = with_defaults(spec.with_changes(seed=3), own=open_storage(all_heads))
    assert (other.std_floor, other.cls_attention_heads) == (DEFAULT_STD_FLOOR, "all")


def test_a_teacher_of_one_head_gives_the_same_either_way(tmp_path, corpus_dir, tiny_specs) -> None:
    changes = {"model_args": tiny_specs[0].model_args | {"num_attention_heads": 1}}
    rows = []
    for heads in ("mean", "all"):
        spec = tiny_specs[0].with_changes(cls_attention_heads=heads, **changes)
        build(tmp_path / heads, corpus_dir, [spec])
        rows.append(open_cache(tmp_path / heads)["clip"].read(range(24)).stored)
    for name, values in rows[0].items():
        assert torch.equal(values.nan_to_num(), rows[1][name].nan_to_num()), name
    assert bool(torch.isfinite(rows[0]["cls_attention"]).all())


def test_a_yaml_file_does_not_say_what_was_recoded(tmp_path) -> None:
    path = tmp_path / "clip.yaml"
    text = load_spec("clip").model_dump_json()
    record = json.loads(text) | {"recoded_from": [{"codec": "float16", "calibration": "0" * 32}]}
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"recoded_from is a record of .*Leave the key out"):
        load_spec(str(path))
