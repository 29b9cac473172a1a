"""Whatever happens to a sealed file, `ls`, `build` and `train` see it, and `build` mends it."""

import contextlib
import shutil

import pytest

from builds import build
from command import invoke
from movekd.cache.contents import open_contents
from movekd.cache.inventory import require_whole, wrong_files
from movekd.cache.storage import open_storage
from movekd.cache.verify import verify
from movekd.cli.cache import app
from movekd.errors import CacheError, MovekdError
from movekd.extract.partition import Partition

DAMAGES = {
    "deleted": lambda path, content: path.unlink(),
    "emptied": lambda path, content: path.write_bytes(b""),
    "shortened": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "lengthened": lambda path, content: path.write_bytes(content + b"\0"),
}

MORE = ("emptied", "shortened")


@pytest.fixture(scope="module")
def original(tmp_path_factory, corpus_dir, tiny_specs):
    """A cache of several Zarr shards per teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("movekd.cache.layout.MAX_SHARD_ROWS", 8)
        patch.setattr("movekd.cache.catalog.MAX_SHARD_ROWS", 8)
        out = tmp_path_factory.mktemp("original") / "cache"
        build(out, corpus_dir, tiny_specs)
    return out


@pytest.fixture
def built(tmp_path, original, small_shards, snapshot):
    """A copy of it that a test may damage, and its files."""
    shutil.copytree(original, tmp_path / "cache")
    return tmp_path / "cache", snapshot(original)


def shard_files(files):
    return [name for name in files if ".zarr/" in name and "/c/" in name and "channel" not in name]


@pytest.mark.parametrize(
    "damage", ["deleted", "lengthened", *(pytest.param(d, marks=pytest.mark.slow) for d in MORE)]
)
def test_every_damaged_shard_file_is_named_and_built_again(
    built, corpus_dir, tiny_specs, snapshot, damage
) -> None:
    cache, whole = built
    files = shard_files(whole)
    assert len(files) == 3 * 5
    for name in files:
        DAMAGES[damage](cache / name, whole[name])
    contents = open_contents(cache)
    found = [
        wrong.name for name in contents.teachers for wrong in wrong_files(contents.sealed(name))
    ]
    assert found == sorted(files)
    for name in contents.teachers:
        with pytest.raises(CacheError, match=rf"{name}\.zarr/.*c/0.*cache build --teacher {name}"):
            require_whole(contents.sealed(name))
    listed = invoke(app, "ls", "--cache", cache)
    assert listed.exit_code == 1
    assert "complete" in listed.stdout
    assert "WRONG" in listed.stdout
    assert "clip.zarr/tokens/c/0/0/0" in listed.stderr

    said = []
    summaries = build(cache, corpus_dir, tiny_specs, tell=said.append)
    assert [s.images_built for s in summaries] == [24, 24]
    assert len(said) == 2
    assert all("3 Zarr shards are built again" in line for line in said)
    assert snapshot(cache) == whole
    assert invoke(app, "ls", "--cache", cache).exit_code == 0


def test_one_wrong_file_costs_one_zarr_shard(built, corpus_dir, tiny_specs, snapshot) -> None:
    cache, whole = built
    (cache / "clip.zarr/cls/c/1/0").unlink()
    said = []
    summaries = build(cache, corpus_dir, tiny_specs, tell=said.append)
    assert [s.images_built for s in summaries] == [8, 0]
    assert said == [
        "clip: clip.zarr/cls/c/1/0 is missing (sealed with "
        f"{len(whole['clip.zarr/cls/c/1/0']):,} bytes). 1 Zarr shard is built again."
    ]
    assert snapshot(cache) == whole


def test_whatever_a_seal_does_not_tell_is_found_by_verify(
    built, corpus_dir, tiny_specs, snapshot
) -> None:
    """Flipped bits keep the size; what `verify` names, `build --verify` mends."""
    cache, whole = built
    for name in ("clip.zarr/tokens/c/2/0/0", "conv.zarr/tokens/c/0/0/0"):
        content = bytearray(whole[name])
        content[7] ^= 1
        (cache / name).write_bytes(content)
    (cache / "clip.seals/00001.json").write_bytes(whole["clip.seals/00001.json"][:-9])
    said = []
    build(cache, corpus_dir, tiny_specs, tell=said.append)
    assert len(said) == 1
    assert "00001.json is damaged" in said[0]
    problems = list(verify(cache))
    assert len(problems) == 2
    assert all("cache build` with --verify" in p for p in problems)

    said.clear()
    summaries = build(cache, corpus_dir, tiny_specs, is_verifying=True, tell=said.append)
    assert [s.images_built for s in summaries] == [8, 8]
    assert "tokens/c/2/0/0 is damaged" in said[0]
    assert "tokens/c/0/0/0 is damaged" in said[1]
    assert snapshot(cache) == whole
    assert list(verify(cache)) == []


def test_an_object_store_is_mended_too(corpus_dir, tiny_specs, small_shards) -> None:
    storage = open_storage("memory://mended/cache")
    build(storage, corpus_dir, tiny_specs[:1])
    whole = {name: storage.read(name) for name in storage.sizes()}
    storage.delete("clip.zarr/tokens/c/0/0/0")
    storage.write("clip.zarr/cls/c/2/0", [b"short"])
    with pytest.raises(CacheError, match=r"cls/c/2/0 has 5 bytes.*tokens/c/0/0/0 is missing"):
        require_whole(open_contents(storage).sealed("clip"))
    build(storage, corpus_dir, tiny_specs[:1])
    assert {name: storage.read(name) for name in storage.sizes()} == whole


def test_parts_mend_their_own_shards(built, corpus_dir, tiny_specs, snapshot) -> None:
    cache, whole = built
    for shard in (0, 1):
        (cache / f"clip.zarr/tokens/c/{shard}/0/0").unlink()
    for part, count in ((1, 1), (0, 1)):
        summary = build(cache, corpus_dir, tiny_specs[:1], partition=Partition(part, 2))
        assert summary[0].images_built == 8 * count
    assert snapshot(cache) == whole


def test_metadata_that_follows_from_the_spec_is_made_again(
    built, corpus_dir, tiny_specs, snapshot
) -> None:
    cache, whole = built
    for name in whole:
        if name.startswith("clip.zarr/") and name.endswith("zarr.json"):
            (cache / name).unlink()
    build(cache, corpus_dir, tiny_specs[:1])
    assert snapshot(cache) == whole


@pytest.mark.slow
def test_every_other_file_is_mended_or_named(built, corpus_dir, tiny_specs, snapshot) -> None:
    """No damage of a small file is passed over: it is mended, or refused with its name."""
    cache, whole = built
    for name in sorted(set(whole) - set(shard_files(whole))):
        for damage in ("deleted", "shortened"):
            DAMAGES[damage](cache / name, whole[name])
            is_seen = True
            with contextlib.suppress(MovekdError):
                is_seen = invoke(app, "ls", "--cache", cache).exit_code == 1
            said = []
            try:
                build(cache, corpus_dir, tiny_specs, tell=said.append)
            except MovekdError as error:
                told = str(error)
            else:
                told = name
                assert snapshot(cache) == whole, (name, damage)
            assert name.rpartition("/")[2] in told, told
            is_seal = any(part in name for part in ("seals/0", "/calibration.", "/skipped."))
            assert is_seen or is_seal, (name, damage)
            shutil.rmtree(cache)
            for file, content in whole.items():
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                (cache / file).write_bytes(content)
