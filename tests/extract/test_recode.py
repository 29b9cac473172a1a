"""A smaller cache out of a larger one: same rows, bounded errors, the same bytes when resumed."""

import json
import shutil

import pytest
import torch

import heavy_tails
from builds import build
from corpus_files import make_unreadable
from kills import kill_at
from movekd.analysis.verify_features import verify_features
from movekd.cache import codecs, layout
from movekd.cache.codecs import ArrayLayout, Codec, codec, register_codec
from movekd.cache.reader import open_cache
from movekd.cache.storage import open_storage
from movekd.cache.verify import status, verify
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError, ConfigError, CorruptCacheError
from movekd.extract.image_loader import image_transform
from movekd.extract.options import BuildOptions
from movekd.extract.recode import recode_cache
from movekd.extract.shard_buffer import stored_output
from movekd.teachers import load_teacher

SKIPPED = 6
ROWS_PER_SHARD = 8


class Signs(Codec):
    """One byte per value and a float16 scale per token; the signs of a rotation are sealed."""

    name = "testsigns"
    decoding = "channel_mean + channel_std * sign * scale * tokens"

    def arrays(self, num_tokens, width):
        return (
            ArrayLayout("tokens", (num_tokens, width), "int8", ("row", "token", "channel"), 0),
            ArrayLayout("scale", (num_tokens, 1), "float16", ("row", "token", "one")),
        )

    def group_arrays(self, width):
        generator = torch.Generator().manual_seed(7)
        signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
        return {"signs": signs.to(torch.int8).numpy()}

    def encode(self, tokens_BND, stats):
        values = stats.standardise(tokens_BND) * stats.codec_arrays["signs"]
        scale = (values.abs().amax(-1, keepdim=True) / 127).half()
        return {"tokens": (values / scale.float()).round().to(torch.int8), "scale": scale}

    def decode_standardised(self, stored, stats):
        signs = stats.codec_arrays["signs"].to(stored["tokens"].device)
        return stored["tokens"].float() * stored["scale"].float() * signs


@pytest.fixture(autouse=True)
def _small_shards(small_shards):
    """Several Zarr shards, and appended images that start at one."""


@pytest.fixture
def signs(monkeypatch):
    """The codec, registered for one test."""
    monkeypatch.setattr(codecs, "_CODECS", dict(codecs._CODECS))
    register_codec(Signs())


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, crops):
    """A corpus of 18 images, and the same with three more; one image cannot be read."""
    found = []
    for count in (18, 21):
        images = tmp_path_factory.mktemp("images")
        for number in range(count):
            crops[number].save(images / f"{number:02d}.png")
        out = tmp_path_factory.mktemp("corpus") / "data"
        pack_folder(images, out, num_workers=1)
        make_unreadable(out, SKIPPED)
        found.append(out)
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory, corpora, tiny_specs):
    """A float16 cache with all heads of the attention, and the same with the appended images."""
    specs = [spec.with_changes(codec="float16", cls_attention_heads="all") for spec in tiny_specs]
    specs[1] = specs[1].with_changes(grid=4)
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("layout", "catalog"):
            patch.setattr(f"movekd.cache.{module}.MAX_SHARD_ROWS", ROWS_PER_SHARD)
        build(folder / "small", corpora[0], specs)
        shutil.copytree(folder / "small", folder / "large")
        build(folder / "large", corpora[1], specs)
    return folder / "small", folder / "large"


def recode(source, out, to="int8", **more):
    return list(recode_cache(source, out, to, **more))


@pytest.fixture(scope="module")
def recoded(tmp_path_factory, sources):
    out = tmp_path_factory.mktemp("recoded") / "int8"
    with pytest.MonkeyPatch.context() as patch:
        for module in ("layout", "catalog"):
            patch.setattr(f"movekd.cache.{module}.MAX_SHARD_ROWS", ROWS_PER_SHARD)
        recode(sources[1], out)
    return out


def test_rows_are_those_of_the_source_encoded_again(sources, recoded) -> None:
    source, found = open_cache(sources[1]), open_cache(recoded, verify="checksum")
    assert list(verify(recoded)) == []
    for name in (layout.CACHE_JSON, layout.INDEX, layout.NAMES):
        assert (recoded / name).read_bytes() == (sources[1] / name).read_bytes()
    assert found.teachers == source.teachers == ("clip", "conv")
    for teacher in found:
        old, new = source[teacher], found[teacher]
        assert new.spec.codec == "int8"
        assert (old.skipped, old.num_rows) == (new.skipped, new.num_rows)
        for statistic in ("mean_D", "std_D"):
            assert torch.equal(getattr(old.stats, statistic), getattr(new.stats, statistic))
        rows = [row for row in source.catalog.rows.tolist() if row != SKIPPED]
        before, after = old.read(rows), new.read(rows)
        expected = codec("int8").encode(before.tokens_BND, old.stats)
        assert torch.equal(after.stored["tokens"], expected["tokens"])
        for array in ("cls", "cls_attention"):
            if array in before.stored:
                assert torch.equal(after.stored[array], before.stored[array])
        assert bool(new.read([SKIPPED]).tokens_BND.isnan().all())
        for file in (layout.skipped_name(teacher), layout.skipped_seal_name(teacher)):
            assert (recoded / file).read_bytes() == (sources[1] / file).read_bytes()


def exact_errors(out, data, teacher, skipped=SKIPPED):
    """The true errors against the teacher's output: mean, maximum, energy, and both if limited."""
    cache, corpus = open_cache(out), open_corpus(data)
    store = cache[teacher]
    rows = [row for row in cache.catalog.rows.tolist() if row != skipped]
    images = [at for at in range(len(corpus)) if at != skipped]
    transform = image_transform(store.spec, "crop")
    pixels = torch.stack([torch.from_numpy(transform(corpus.read_image(at))) for at in images])
    spec = store.spec.with_changes(recoded_from=())
    output = stored_output(load_teacher(spec).forward(pixels), spec)
    exact_BND = store.stats.standardise(output.tokens_BND).double()
    found_BND = store.read(rows).standardised_BND.double()
    energy = (found_BND - exact_BND).square().sum() / exact_BND.square().sum()
    errors = []
    for limit in (1e9, 8):
        decoded, exact = found_BND.clamp(-limit, limit), exact_BND.clamp(-limit, limit)
        relative = (decoded - exact).norm(dim=-1) / exact.norm(dim=-1)
        errors += [relative.mean().item(), relative.max().item()]
    return errors[0], errors[1], energy.item(), *errors[2:]


@pytest.mark.parametrize("teacher", ["clip", "conv"])
def test_the_seals_bound_the_error_against_the_teacher(recoded, corpora, teacher) -> None:
    mean, largest, energy, *_ = exact_errors(recoded, corpora[1], teacher)
    (found,) = [each for each in status(open_cache(recoded)) if each.teacher == teacher]
    # Loose by at most the error of float16, a twentieth of int8's.
    assert mean * (1 - 1e-3) <= found.error_mean <= 1.15 * mean
    assert largest * (1 - 1e-3) <= found.error_max <= 1.3 * largest
    assert energy * 0.98 <= found.error_energy <= 1.4 * energy
    seal = open_cache(recoded)[teacher].seals[0].error
    assert 0 < seal.recoded_mean < seal.mean
    assert seal.recoded_max < seal.max


def test_the_attributes_name_where_the_rows_came_from(sources, recoded) -> None:
    source, found = open_cache(sources[1])["clip"], open_cache(recoded)["clip"]
    stored = json.loads((recoded / "clip.zarr" / "zarr.json").read_text())["attributes"]["movekd"]
    origin = {"codec": "float16", "calibration": source.calibration.hash}
    assert stored["spec"]["recoded_from"] == [origin]
    assert stored["weights_sha256"] == source.calibration.weights_sha256
    assert "recoded_from" not in source.spec.as_stored()
    direct = found.spec.with_changes(recoded_from=())
    assert found.spec.fingerprint not in (direct.fingerprint, source.spec.fingerprint)
    (first, _) = status(open_cache(recoded))
    assert first.recoded_from == ("float16",)
    assert first.random_weights


def test_heavy_tails_and_a_teacher_of_the_users_own(tmp_path, corpus_dir) -> None:
    """Outliers of a thousand sigma hide nothing: the limited errors are bounds as well."""
    spec = heavy_tails.spec(
        model_args={"rate": 0.02}, codec="float16", std_floor=0.0, calibration_images=6
    )
    build(tmp_path / "source", corpus_dir, [spec])
    out = tmp_path / "out"
    (summary,) = recode(tmp_path / "source", out)
    found, true = summary.status, exact_errors(out, corpus_dir, "heavy", skipped=None)
    bounds = [found.error_mean, found.error_max, found.error_energy]
    bounds += [found.error_limited_mean, found.error_limited_max]
    for exact, bound in zip(true, bounds, strict=True):
        assert exact * (1 - 1e-3) <= bound <= 2 * exact
    assert found.error_limited_mean > 5 * found.error_mean

    options, corpus = BuildOptions(batch_size=5, num_workers=0), open_corpus(corpus_dir)
    (sentence,) = verify_features(out, corpus, 4, options=options)
    assert "code is not run because a cache names it" in sentence
    assert list(verify_features(out, corpus, 4, options=options, specs=[spec])) == []


def test_an_object_store_holds_the_same_bytes(sources, recoded) -> None:
    recode(sources[1], "memory://recoded/int8")
    storage = open_storage("memory://recoded/int8")
    assert {name: storage.read(name) for name in storage.sizes()} == {
        path.relative_to(recoded).as_posix(): path.read_bytes()
        for path in recoded.rglob("*")
        if path.is_file()
    }


def test_the_features_are_recomputed(recoded, corpora) -> None:
    options = BuildOptions(batch_size=5, num_workers=0)
    assert list(verify_features(recoded, open_corpus(corpora[1]), 6, options=options)) == []


def test_a_codec_with_its_arrays_and_another_length_of_zarr_shards(
    signs, tmp_path, sources, monkeypatch, tiny_specs, corpora
) -> None:
    """Two Zarr shards of float16 become one, and the rotation's signs are sealed with the group."""
    monkeypatch.setattr(layout, "SHARD_BYTES", 4 * 16 * 144 * 2)
    source = tmp_path / "source"
    build(source, corpora[0], [tiny_specs[0].with_changes(codec="float16")])
    (summary,) = recode(source, tmp_path / "out", "testsigns")
    old, new = open_cache(source)["clip"], open_cache(tmp_path / "out")["clip"]
    assert (old.layout.rows_per_shard, new.layout.rows_per_shard) == (4, 8)
    assert list(verify(tmp_path / "out")) == []
    assert new.group_arrays["signs"].dtype == "int8"
    assert new.seals[0].error.num_tokens == 7 * 16
    assert new.layout.row_bytes == summary.row_bytes < summary.source_row_bytes
    mean, largest, energy, *_ = exact_errors(tmp_path / "out", corpora[0], "clip")
    assert mean < summary.status.error_mean < 1.2 * mean
    assert largest < summary.status.error_max < 1.3 * largest
    assert energy < summary.status.error_energy < 1.5 * energy

    monkeypatch.setattr(layout, "SHARD_BYTES", 128 * 2**20)
    recode(sources[0], tmp_path / "int8", teachers=["clip"])
    recode(tmp_path / "int8", tmp_path / "twice", "testsigns")
    twice = open_cache(tmp_path / "twice")["clip"]
    assert [origin.codec for origin in twice.spec.recoded_from] == ["float16", "int8"]
    mean, largest, *_ = exact_errors(tmp_path / "twice", corpora[0], "clip")
    (found,) = status(open_cache(tmp_path / "twice"))
    assert found.error_mean >= mean
    assert found.error_max >= largest


@pytest.mark.parametrize("to", ["int4", "lloyd2", "lowrank2"])
def test_a_chosen_rank_and_float16_become_any_codec_of_few_bits(
    tmp_path, corpora, tiny_specs, sources, to
) -> None:
    spec = tiny_specs[0].with_changes(codec="lowrank", max_energy_error=0.3, cls_attention=False)
    build(tmp_path / "chosen", corpora[0], [spec])
    assert open_cache(tmp_path / "chosen")["clip"].calibration.codec == "lowrank8"
    for number, source in enumerate((sources[0], tmp_path / "chosen")):
        out = tmp_path / f"out{number}"
        old = open_cache(source)["clip"]
        if to != "lowrank2" and number == 1:  # a few tokens of lowrank8 take fewer bytes
            with pytest.raises(ConfigError, match=rf"bytes as lowrank8 and .* as {to}; recoding"):
                recode(source, out, to, teachers=["clip"])
            continue
        recode(source, out, to, teachers=["clip"])
        assert list(verify(out)) == []
        new = open_cache(out)["clip"]
        assert (new.spec.codec, new.calibration.codec) == (to, None)
        assert new.spec.recoded_from[0].codec == ("float16", "lowrank8")[number]
        rows = [row for row in range(old.num_rows) if row != SKIPPED]
        stats = old.stats.for_codec(codec(to))
        expected = codec(to).encode(old.read(rows).tokens_BND, stats)
        assert all(torch.equal(new.read(rows).stored[name], expected[name]) for name in expected)


def test_all_heads_become_their_mean(tmp_path, sources) -> None:
    recode(sources[0], tmp_path / "out", teachers=["clip"], cls_attention_heads="mean")
    before, after = (
        open_cache(cache)["clip"].read([0, 9]) for cache in (sources[0], tmp_path / "out")
    )
    assert after.stored["cls_attention"].shape == (2, 1, 16)
    expected = before.cls_attention_BHN.mean(1, keepdim=True).half()
    assert torch.equal(after.stored["cls_attention"], expected)
    assert list(verify(tmp_path / "out")) == []
    with pytest.raises(ConfigError, match=r"has the mean over heads .*leave --cls"):
        recode(tmp_path / "out", tmp_path / "more", "float16", cls_attention_heads="all")


@pytest.mark.parametrize("stride", [130, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_and_run_again_equals_undisturbed(tmp_path, sources, snapshot, stride) -> None:
    def run(out):
        recode(sources[0], out, teachers=["clip"])

    run(tmp_path / "undisturbed")
    expected, event, killed = snapshot(tmp_path / "undisturbed"), min(stride, 60), True
    while killed:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        killed = kill_at(event, lambda out=out: run(out), str(out))
        run(out)
        assert snapshot(out) == expected, event
        event += stride
    assert event > 150


def test_sealed_zarr_shards_are_not_made_again_and_lost_ones_are(
    tmp_path, sources, recoded, snapshot
) -> None:
    out = tmp_path / "out"
    shutil.copytree(recoded, out)
    assert [summary.rows_recoded for summary in recode(sources[1], out)] == [0, 0]
    (out / layout.seal_name("clip", 1)).unlink()
    lost = out / "conv.zarr" / "tokens" / "c" / "2" / "0" / "0"
    lost.write_bytes(lost.read_bytes()[:-1])
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("c/0/*")}
    said = []
    summaries = recode(sources[1], out, tell=said.append)
    assert [summary.rows_recoded for summary in summaries] == [8, 2]
    assert "conv" in said[0]
    assert "1 Zarr shard is built again" in said[0]
    assert snapshot(out) == snapshot(recoded)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    content = lost.read_bytes()
    lost.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    (problem,) = verify(out)
    assert "Run its `movekd cache recode` with --verify" in problem
    said.clear()
    recode(sources[1], out, is_verifying=True, tell=said.append)
    assert said == [f"conv: {problem}"]
    assert snapshot(out) == snapshot(recoded)


def test_one_teacher_after_the_other_and_appended_images(
    tmp_path, sources, recoded, snapshot
) -> None:
    out = tmp_path / "out"
    for teacher in ("conv", "clip"):
        recode(sources[0], out, teachers=[teacher])
    recode(sources[1], out)
    assert snapshot(out) == snapshot(recoded)


def test_a_build_does_not_mix_its_rows_with_recoded_ones(
    tmp_path, recoded, corpora, snapshot, tiny_specs
) -> None:
    out = tmp_path / "out"
    shutil.copytree(recoded, out)
    before = snapshot(out)
    sentence = r"'clip' in .* was recoded from codec float16, .*`movekd cache recode` again"
    for heads in (None, "all"):
        asked = tiny_specs[0].with_changes(cls_attention_heads=heads)
        with pytest.raises(CacheError, match=sentence):
            build(out, corpora[1], [asked])
    assert snapshot(out) == before
    build(out, corpora[1], [tiny_specs[0]], replace=True)  # the whole teacher anew
    assert open_cache(out)["clip"].spec.recoded_from == ()


def test_a_damaged_source_is_not_sealed_again(tmp_path, sources) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources[0], source)
    path = source / "clip.zarr" / "tokens" / "c" / "1" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCacheError, match="c/1/0/0 is damaged"):
        recode(source, tmp_path / "out", teachers=["clip"])
    assert not (tmp_path / "out" / layout.seal_name("clip", 1)).exists()


def test_limits_stop_it_and_those_of_the_source_are_named(tmp_path, corpora, tiny_specs) -> None:
    limited = tiny_specs[0].with_changes(codec="float16", max_error=0.01)
    build(tmp_path / "source", corpora[0], [limited])
    source, out, said = tmp_path / "source", tmp_path / "out", []
    with pytest.raises(CacheError, match=r"max_error 0.10%. The error of the source is part of it"):
        recode(source, out, max_error=1e-3)
    with pytest.raises(
        CacheError, match=r"allows max_energy_error 0.000%. The error of the source"
    ):
        recode(source, out, max_energy_error=1e-9)
    recode(source, out, max_error=0.5)
    recode(source, out, tell=said.append)
    assert said == [
        "clip: max_error 0.01 of its spec was a limit for codec float16 and is not compared; give "
        "--max-error to set one for int8."
    ]


def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path, sources, recoded, snapshot, corpora, tiny_specs
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources[0], source)
    before = snapshot(source)
    for to, sentence in (
        ("float16", r"is stored as float16 already; name another codec"),
        ("int9", r"no codec 'int9'\. Did you mean 'int8'"),
        ("lowrank", r"--to lowrank leaves the rank .* name a rank, such as lowrank32"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            recode(source, out, to)
    with pytest.raises(ConfigError, match=r"bytes as int8 and .* as float16; recoding loses"):
        recode(recoded, out, "float16")
    for place in (source, source / "small", tmp_path, source / ".." / "source"):
        with pytest.raises(ConfigError, match="that is read, or lies in it or around it"):
            recode(source, place)
    with pytest.raises(CacheError, match=r"holds no teacher 'clop'\. Did you mean 'clip'"):
        recode(source, out, teachers=["clop"])
    (source / layout.seal_name("conv", 0)).unlink()
    with pytest.raises(CacheError, match=r"'conv' in .* lacks 1 of 3 Zarr shards; .*cache build"):
        recode(source, out)
    assert not out.exists()
    (source / layout.seal_name("conv", 0)).write_bytes(before["conv.seals/00000.json"])
    assert snapshot(source) == before

    other = tmp_path / "other"
    build(other, corpora[0], [tiny_specs[1].with_changes(name="other")], geometry="pad")
    unchanged = snapshot(other)
    with pytest.raises(CacheError, match="is a cache of other images, geometry or views"):
        recode(source, other)
    assert snapshot(other) == unchanged
    built = tmp_path / "built"
    build(built, corpora[0], tiny_specs[:1])
    unchanged = snapshot(built)
    with pytest.raises(CacheError, match="holds 'clip' already, and not as int8 recoded from this"):
        recode(source, built)
    assert snapshot(built) == unchanged
