"""codec: lowrank: the calibration chooses the smallest rank that keeps max_energy_error."""

import json
import shutil

import numpy as np
import pytest
import torch
import xxhash

from builds import OPTIONS, build
from movekd.cache.codecs.lowrank import RANKS, Lowrank
from movekd.cache.contents import open_contents
from movekd.cache.reader import open_cache
from movekd.cache.schema import Calibration
from movekd.cache.seal import sealed_bytes, write_sealed
from movekd.cache.stats import ChannelStats
from movekd.cache.storage import open_storage
from movekd.cache.verify import status, verify
from movekd.errors import CacheError, ConfigError
from movekd.extract import choose_rank
from movekd.extract.choose_rank import LIMIT_SHARE, CodecChoice
from movekd.extract.run_teacher import LiveFeatures


def smooth(num_images: int, seed: int) -> torch.Tensor:
    """Return tokens (B, 64, 80) of which a rank of 12 to 32 holds 90 to 99%."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(num_images, side, 64, generator=generator))[0]
        for side in (64, 80)
    )
    return (u * 0.93 ** torch.arange(64)) @ v.mT * 20


def choose(spec, tokens: torch.Tensor, images=None) -> str:
    images = np.arange(len(tokens)) if images is None else images
    choice = CodecChoice(spec, images)
    for start in range(0, len(tokens), 3):
        part = tokens[start : start + 3]
        choice.keep(LiveFeatures(part, None, None, images=range(start, start + len(part))))
    stats = ChannelStats(torch.zeros(80), torch.ones(80))
    return choice.result(stats, OPTIONS, lambda *_: None)


def energy_error(rank: int, tokens: torch.Tensor) -> float:
    stats = ChannelStats(torch.zeros(80), torch.ones(80)).for_codec(Lowrank(rank))
    errors = Lowrank(rank).error(tokens, Lowrank(rank).encode(tokens, stats), stats)
    return (errors.squared_error / errors.squared_norm).item()


@pytest.mark.parametrize("limit", [0.3, 0.1, 0.05, 0.02])
def test_the_smallest_rank_below_the_limit_is_chosen(limit, tiny_specs) -> None:
    tokens = smooth(7, seed=0)
    spec = tiny_specs[0].with_changes(codec="lowrank", max_energy_error=limit)
    rank = int(choose(spec, tokens).removeprefix("lowrank"))
    below = max((smaller for smaller in RANKS if smaller < rank), default=None)
    assert energy_error(rank, tokens) <= LIMIT_SHARE * limit
    assert below is None or energy_error(below, tokens) > LIMIT_SHARE * limit
    assert energy_error(rank, smooth(7, seed=1)) < limit  # of other images as well


def test_a_limit_that_no_rank_keeps_is_said(tiny_specs) -> None:
    spec = tiny_specs[0].with_changes(codec="lowrank", max_energy_error=1e-6)
    sentence = r"'clip': rank 64 stores .* energy error of 0\.\d+%; expected .*--codec int8"
    with pytest.raises(CacheError, match=sentence):
        choose(spec, smooth(2, seed=0))


def test_few_images_are_kept(tiny_specs, monkeypatch) -> None:
    """The first ones by key, however many the calibration has; of other codecs none."""
    spec = tiny_specs[0].with_changes(codec="lowrank", max_energy_error=0.1)
    monkeypatch.setattr(choose_rank, "MAX_BYTES", 2 * 4 * 64 * 80 + 1)
    tokens = smooth(6, seed=0)
    tokens[[0, 1, 2, 3]] = float("nan")  # would be refused
    assert choose(spec, tokens, images=np.array([5, 4, 0, 1, 2, 3])).startswith("lowrank")
    assert choose(tiny_specs[0], tokens) == tiny_specs[0].codec
    with pytest.raises(CacheError, match="the 1 images that ranks are tried on cannot be read"):
        choose(spec, tokens, images=np.array([99]))


def test_without_a_limit_the_spec_is_refused(tiny_specs) -> None:
    with pytest.raises(ConfigError, match=r"lowrank needs max_energy_error.*lowrank32"):
        tiny_specs[0].with_changes(codec="lowrank")


@pytest.fixture
def chosen_cache(tmp_path, corpus_dir, tiny_specs, small_shards):
    """A cache of one teacher whose rank was chosen; and its spec."""
    spec = tiny_specs[0].with_changes(codec="lowrank", max_energy_error=0.05)
    build(tmp_path / "cache", corpus_dir, [spec])
    return tmp_path / "cache", spec


def test_what_was_chosen_is_sealed_and_every_reader_uses_it(
    chosen_cache, tmp_path, corpus_dir, snapshot
) -> None:
    path, spec = chosen_cache
    store = open_cache(path)["clip"]
    name = store.calibration.codec
    assert name in [f"lowrank{rank}" for rank in RANKS]
    assert store.spec.codec == "lowrank"
    assert list(verify(path)) == []
    (found,) = status(open_contents(path))
    assert found.codec == store.codec_name == name
    assert 0 < found.error_energy < 0.05
    assert all(seal.error.energy < 0.05 for seal in store.seals.values())
    rank = Lowrank(int(name.removeprefix("lowrank")))
    assert store.layout.arrays["tokens"] == rank.arrays(16, 144)[0]

    # The same rank by name has the same rows.
    named = spec.with_changes(codec=name, max_energy_error=None)
    build(tmp_path / "named", corpus_dir, [named])
    other = open_cache(tmp_path / "named")["clip"]
    rows = range(store.num_rows)
    assert torch.equal(store.read(rows).tokens_BND, other.read(rows).tokens_BND)
    assert other.calibration.codec is None

    # Interrupted and resumed equals uninterrupted, and a new limit keeps the rank.
    expected = snapshot(path)
    resumed = tmp_path / "resumed"
    shutil.copytree(path, resumed)
    for shard in store.sealed_shards[1:]:
        (resumed / "clip.seals" / f"{shard:05d}.json").unlink()
        (resumed / "clip.zarr" / "channel_codes" / "c" / f"{shard}" / "0" / "0").unlink()
    build(resumed, corpus_dir, [spec.with_changes(max_energy_error=0.5)])
    assert snapshot(resumed) == expected


@pytest.mark.parametrize(("codec", "chosen"), [("lowrank", None), ("int8", "lowrank8")])
def test_a_choice_that_the_spec_does_not_leave_open_is_refused(
    chosen_cache, tmp_path, corpus_dir, tiny_specs, codec, chosen
) -> None:
    path, _ = chosen_cache
    if codec == "int8":
        path = tmp_path / "int8"
        build(path, corpus_dir, [tiny_specs[0].with_changes(codec="int8")])
    storage = open_storage(path)
    calibration = open_contents(path).sealed("clip").calibration
    changed = calibration.model_copy(update={"codec": chosen})
    write_sealed(storage, "clip.seals/calibration.json", changed)
    with pytest.raises(CacheError, match="sealed for another spec"):
        open_contents(path).sealed("clip")


def test_calibrations_of_other_codecs_keep_their_bytes_and_their_hash() -> None:
    """As earlier versions wrote them: no key more, and the hash over the same text."""
    content = {
        "spec_fingerprint": "a" * 64,
        "weights_sha256": "b" * 64,
        "dtype": "float32",
        "is_compiled": False,
        "batch_size": 5,
        "num_images": 12,
        "num_tokens": 16,
        "width": 144,
        "cls_width": None,
        "num_heads": 4,
        "channel_stats_xxh3_128": "c" * 32,
    }
    text = (
        f"[('batch_size', 5), ('channel_stats_xxh3_128', '{'c' * 32}'), ('cls_width', None), "
        "('dtype', 'float32'), ('is_compiled', False), ('num_heads', 4), ('num_images', 12), "
        f"('num_tokens', 16), ('spec_fingerprint', '{'a' * 64}'), "
        f"('weights_sha256', '{'b' * 64}'), ('width', 144)]"
    )
    calibration = Calibration.model_validate(content)
    assert calibration.hash == xxhash.xxh3_128(text.encode()).hexdigest()
    written = json.loads(sealed_bytes(calibration))
    written.pop("xxh3_128")
    assert written == content
    chosen = Calibration.model_validate(content | {"codec": "lowrank48"})
    assert chosen.hash != calibration.hash
    assert json.loads(sealed_bytes(chosen))["codec"] == "lowrank48"
