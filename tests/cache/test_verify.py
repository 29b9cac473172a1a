import re
import shutil

import numpy as np
import pytest

from movekd.cache import layout
from movekd.cache.catalog import update_catalog
from movekd.cache.reader import open_cache
from movekd.cache.seal import read_sealed, write_sealed
from movekd.cache.storage import open_storage
from movekd.cache.verify import status, verify
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError


@pytest.fixture
def copy(tmp_path, cache_dir):
    """A copy of the cache that a test may damage."""
    shutil.copytree(cache_dir, tmp_path / "cache")
    return tmp_path / "cache"


def test_a_whole_cache_has_no_problem_and_every_byte_is_read(cache_dir) -> None:
    sizes, read = open_storage(cache_dir).sizes(), []
    assert list(verify(cache_dir, read.append)) == []
    seals = [name for name in sizes if re.fullmatch(r"cache.json|[a-z]+\.seals/.*\.json", name)]
    assert sum(read) == sum(sizes.values()) - sum(sizes[name] for name in seals)


def test_every_flipped_bit_is_found(copy, snapshot) -> None:
    generator = np.random.default_rng(1)
    whole = snapshot(copy)
    small = [name for name in whole if not name.endswith(("c/0/0/0", "c/0/0"))]
    for attempt in range(100):
        name = sorted(whole)[attempt] if attempt < len(whole) else str(generator.choice(small))
        changed = bytearray(whole[name])
        position = int(generator.integers(len(changed)))
        changed[position] ^= 1 << int(generator.integers(8))
        (copy / name).write_bytes(changed)
        assert list(verify(copy)), (name, position)
        (copy / name).write_bytes(whole[name])
    assert list(verify(copy)) == []


def test_every_missing_or_truncated_file_is_found(copy, snapshot) -> None:
    for name, data in snapshot(copy).items():
        (copy / name).write_bytes(data[:-1])
        assert list(verify(copy)), name
        (copy / name).unlink()
        if name == layout.CACHE_JSON:
            with pytest.raises(CacheError, match="holds no cache"):
                list(verify(copy))
        else:
            assert list(verify(copy)), name
        (copy / name).write_bytes(data)
    assert list(verify(copy)) == []


def test_sentences_name_the_file_and_what_to_do(copy) -> None:
    tokens = copy / "clip.zarr" / "tokens" / "c" / "0" / "0" / "0"
    changed = bytearray(tokens.read_bytes())
    changed[100] ^= 1
    tokens.write_bytes(changed)
    (copy / "clip.zarr" / "cls" / "notes.txt").write_text("mine")
    (copy / "conv.seals" / "00000.json").unlink()
    found = sorted(verify(copy))
    assert len(found) == 4
    assert any(f"{tokens} is damaged" in p and "build` with --verify" in p for p in found)
    assert any("notes.txt is covered by no seal" in p for p in found)
    assert any("Zarr shard 0 is not built" in p for p in found)
    assert any("conv.zarr/tokens/c/0/0/0 is covered by no seal" in p for p in found)


def test_what_no_build_leaves_is_found(copy) -> None:
    """Leftovers of killed writes, seals beyond the last Zarr shard, foreign files; no locks."""
    (copy / "clip.seals" / ".part-0-of-1.lock").write_text("pid 1")
    (copy / "clip.seals" / ".00000.lock.3").write_text("pid 1")
    assert list(verify(copy)) == []
    shutil.copy(copy / "clip.seals" / "00000.json", copy / "clip.seals" / "00007.json")
    (copy / "clip.seals" / "notes.txt").write_text("mine")
    (copy / ".clip.zarr.tokens.c.0.0.0.12-ab.tmp").write_bytes(b"half")
    (copy / "clip.zarr" / ".tokens.tmp").write_bytes(b"half")
    found = list(verify(copy))
    assert len(found) == 4
    for sentence in (
        "00007.json seals a Zarr shard that the cache does not have; it has 1",
        "notes.txt is no seal of this teacher",
        ".12-ab.tmp was left by a write that did not end",
        ".tokens.tmp is covered by no seal",
    ):
        assert [p for p in found if sentence in p], sentence


def test_a_seal_that_leads_out_of_the_group_is_not_followed(copy, tmp_path) -> None:
    (tmp_path / "secret").write_text("s")
    storage, name = open_storage(copy), layout.seal_name("conv", 0)
    for outside in ("../../secret", str(tmp_path / "secret")):
        seal = read_sealed(storage, name)
        entry = next(iter(seal["files"].values()))
        write_sealed(storage, name, seal | {"files": seal["files"] | {outside: entry}})
        assert any("outside of" in p and "tampered" in p for p in verify(copy))


def test_shards_of_another_calibration_are_found(copy) -> None:
    storage, name = open_storage(copy), layout.seal_name("conv", 0)
    write_sealed(storage, name, read_sealed(storage, name) | {"calibration": "0" * 32})
    assert [p for p in verify(copy) if "another calibration" in p]


def test_statistics_of_another_calibration_are_found(copy) -> None:
    """Even when the metadata's own seal was made again over them."""
    storage, name = open_storage(copy), layout.metadata_name("clip")
    whole = read_sealed(storage, name)
    for changed, other in (("channel_mean", "channel_std"), ("channel_std", "channel_mean")):
        file = copy / "clip.zarr" / changed / "c" / "0"
        kept = file.read_bytes()
        shutil.copy(copy / "clip.zarr" / other / "c" / "0", file)
        entry = whole["files"][f"{other}/c/0"]
        write_sealed(storage, name, whole | {"files": whole["files"] | {f"{changed}/c/0": entry}})
        assert any("differ from the sealed calibration" in p for p in verify(copy))
        file.write_bytes(kept)
        write_sealed(storage, name, whole)
    assert list(verify(copy)) == []


def test_a_teacher_whose_whole_folder_is_gone_is_found(copy) -> None:
    shutil.rmtree(copy / "clip.zarr")
    assert any("clip.zarr" in p for p in verify(copy))
    shutil.rmtree(copy / "clip.seals")
    shutil.copytree(copy / "conv.zarr", copy / "clip.zarr")
    assert any("clip.zarr has no sealed calibration" in p for p in verify(copy))


@pytest.mark.parametrize("change", [{"files": {}}, {"rows": [0, 8]}, {"rows": [8, 24]}])
def test_a_seal_that_covers_less_than_its_shard_is_found(copy, change) -> None:
    """Its own checksum right, as after a file was restored under another name."""
    storage, name = open_storage(copy), layout.seal_name("clip", 0)
    write_sealed(storage, name, read_sealed(storage, name) | change)
    assert any(f"{name} covers" in p and "build` with --verify" in p for p in verify(copy))


def test_metadata_that_covers_less_than_the_group_is_found(copy) -> None:
    storage, name = open_storage(copy), layout.metadata_name("clip")
    whole = read_sealed(storage, name)
    files = {file: entry for file, entry in whole["files"].items() if "attention" not in file}
    write_sealed(storage, name, whole | {"files": files})
    assert any(f"{name} covers" in p for p in verify(copy))
    write_sealed(storage, name, whole | {"num_rows": 23})
    assert any(f"{name} covers" in p for p in verify(copy))


@pytest.mark.parametrize("outside", ["channel_mean/../../../secret", "../secret"])
def test_metadata_that_leads_out_of_the_group_is_not_followed(copy, tmp_path, outside) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    storage, name = open_storage(copy), layout.metadata_name("clip")
    whole, read = read_sealed(storage, name), []
    entry = {"size_bytes": 1, "xxh3_128": "0" * 32}
    write_sealed(storage, name, whole | {"files": whole["files"] | {outside: entry}})
    storage.read_many, original = (
        lambda names, *limit: read.extend(names) or original(names, *limit),
        (storage.read_many),
    )
    open_cache(storage)["clip"]
    assert not [path for path in read if "secret" in path]
    assert any("outside of" in p for p in verify(copy))


def test_status_counts_what_is_there(copy, cache_dir) -> None:
    clip, conv = status(open_cache(cache_dir))
    assert (clip.teacher, clip.images, clip.sealed_shards, clip.total_shards) == ("clip", 24, 1, 1)
    assert (clip.grid, clip.width, clip.codec, clip.skipped) == (4, 144, "int8", 0)
    assert clip.random_weights
    assert 0 < clip.error_mean < clip.error_max < 0.02
    files = (cache_dir / "conv.zarr" / "tokens" / "c").rglob("*")
    assert conv.size_bytes == sum(path.stat().st_size for path in files if path.is_file())
    (copy / layout.seal_name("conv", 0)).unlink()
    missing = status(open_cache(copy))[1]
    assert (missing.sealed_shards, missing.total_shards) == (0, 1)
    assert (missing.error_mean, missing.error_max, missing.size_bytes) == (None, None, 0)


RECORDS = ["cache.json", "calibration.json", "metadata.json", "skipped.json", "00000.json"]


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("content", [{}, {"files": 3}, {"rows": [1]}, {"error": {}, "files": []}])
def test_a_sealed_file_of_other_keys_is_a_sentence(copy, name, content) -> None:
    """Its own checksum right: as another version, or somebody's script, may have written it."""
    storage = open_storage(copy)
    path = name if name == "cache.json" else f"clip.seals/{name}"
    for changed in (content, read_sealed(storage, path) | content | {"colour": 1}):
        write_sealed(storage, path, changed)
        problems = list(verify(copy))
        assert [p for p in problems if f"{path}: " in p and "by another version" in p], problems


def test_damaged_seals_say_what_to_do(copy) -> None:
    for name in RECORDS[1:]:
        whole = (copy / "clip.seals" / name).read_bytes()
        (copy / "clip.seals" / name).write_bytes(b"?")
        problems = [p for p in verify(copy) if f"{name} is damaged" in p]
        assert problems
        assert all("again" in p or "--overwrite" in p for p in problems), problems
        (copy / "clip.seals" / name).write_bytes(whole)


def test_seals_of_other_images_are_found(copy, corpus_dir, tmp_path, crops) -> None:
    """As after cache.json and its tables were restored from another cache of as many images."""
    for number, image in enumerate(crops[1:25]):
        (tmp_path / "images").mkdir(exist_ok=True)
        image.rotate(90).save(tmp_path / "images" / f"{number:02d}.png")
    pack_folder(tmp_path / "images", tmp_path / "other", num_workers=1)
    update_catalog(open_storage(tmp_path / "made"), open_corpus(tmp_path / "other"), "crop")
    for name in (layout.CACHE_JSON, layout.INDEX, layout.NAMES):
        shutil.copy(tmp_path / "made" / name, copy / name)
    problems = list(verify(copy))
    assert any("clip.seals/00000.json was made for other images" in p for p in problems)
    cache = open_cache(copy)
    with pytest.raises(CacheError, match=r"clip\.zarr: the Zarr shards 0 were sealed for other"):
        cache["clip"].require_images(cache.catalog)


def test_no_cache_is_no_damaged_one(tmp_path) -> None:
    with pytest.raises(CacheError, match="holds no cache"):
        list(verify(tmp_path))
