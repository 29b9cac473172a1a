"""Tests of movekd.cache.reader on caches with gaps, damaged files and parts of other caches."""

import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from movekd.cache import layout
from movekd.cache.contents import open_contents
from movekd.cache.reader import TeacherCache, open_cache
from movekd.cache.seal import blocks_of
from movekd.cache.verify import status
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError, CorruptCacheError
from movekd.extract.run import build_cache
from stored_rows import OPTIONS, assert_equal


def test_rows_that_are_not_built_yet_are_refused(stores, tmp_path, small_shards) -> None:
    shutil.copytree(stores["none"].storage.local_dir, tmp_path / "cache")
    (tmp_path / "cache" / layout.seal_name("clip", 1)).unlink()
    store = open_cache(tmp_path / "cache")["clip"]
    assert store.missing_shards == [1]
    assert not store.is_complete
    store.read([0, 7, 16, 23])
    with pytest.raises(CacheError, match=r"row 8 of teacher 'clip' .*1 of 3 Zarr shards.*again"):
        store.read([0, 8])


def test_rows_in_the_gap_before_appended_images_are_refused(
    tmp_path, crops, tiny_specs, small_shards
) -> None:
    for count in (10, 13):
        (tmp_path / f"{count}").mkdir()
        for number in range(count):
            crops[number].save(tmp_path / f"{count}" / f"{number:02d}.png")
        pack_folder(tmp_path / f"{count}", tmp_path / f"data{count}", num_workers=1)
        corpus = open_corpus(tmp_path / f"data{count}")
        out = tmp_path / "cache"
        list(build_cache(out, corpus, tiny_specs[1:], geometry="pad", options=OPTIONS))
    cache = open_cache(out)
    assert cache.rows(["12.png", "09.png"]).tolist() == [18, 9]
    cache["conv"].read([9, 16, 18])
    for row in (10, 15):
        with pytest.raises(CacheError, match="stands for no image: it lies in the gap"):
            cache["conv"].read([row])
    tokens = zarr.open_array(out / "conv.zarr" / "tokens", mode="r")
    assert np.isnan(tokens[10:16]).all()
    assert not np.isnan(tokens[16:]).any()


def damaged(stores, tmp_path, change) -> TeacherCache:
    """The uncompressed store with the bytes of its first tokens shard changed."""
    shutil.copytree(stores["none"].storage.local_dir, tmp_path / "cache")
    path = tmp_path / "cache" / "clip.zarr" / "tokens" / "c" / "0" / "0" / "0"
    path.write_bytes(change(path.read_bytes()))
    return open_cache(tmp_path / "cache")["clip"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[2304:], "truncated"),
        (lambda data: data[:20], "has 20 bytes, its seal says 18564: it is truncated"),
        (lambda data: b"", "has 0 bytes"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "checksum of the shard index"),
    ],
)
def test_a_damaged_shard_is_a_sentence(stores, tmp_path, small_shards, change, message) -> None:
    store = damaged(stores, tmp_path, change)
    with pytest.raises(CorruptCacheError, match=f"{message}.*movekd cache verify"):
        store.read([1])


def test_a_missing_shard_is_a_sentence(stores, tmp_path, small_shards) -> None:
    store = damaged(stores, tmp_path, lambda data: data)
    (tmp_path / "cache" / "clip.zarr" / "tokens" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(CorruptCacheError, match="is sealed but cannot be opened"):
        store.read([1])


def test_a_damaged_compressed_shard_is_a_sentence(stores, tmp_path, small_shards) -> None:
    shutil.copytree(stores["zstd"].storage.local_dir, tmp_path / "cache")
    path = tmp_path / "cache" / "clip.zarr" / "tokens" / "c" / "0" / "0" / "0"
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(CorruptCacheError, match=r"teacher 'clip' in .*cannot be decoded"):
        open_cache(tmp_path / "cache")["clip"].read([1])


@pytest.mark.parametrize(
    "file", ["zarr.json", "channel_mean/zarr.json", "channel_std/c/0", "channel_mean/c/0"]
)
def test_damaged_metadata_is_a_sentence(cache_dir, tmp_path, file) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    path = tmp_path / "cache" / "clip.zarr" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptCacheError, match="rebuild this teacher"):
        open_cache(tmp_path / "cache")["clip"]


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_rows_in_a_gap_are_refused_alike(
    tmp_path, crops, tiny_specs, small_shards, compressor, monkeypatch
) -> None:
    """Mapped, through TensorStore, and through zarr, which would give zeros."""
    spec = tiny_specs[0].with_changes(compressor=compressor)
    for count in (10, 13):
        (tmp_path / f"{count}").mkdir()
        for number in range(count):
            crops[number].save(tmp_path / f"{count}" / f"{number:02d}.png")
        data = tmp_path / f"data{count}"
        pack_folder(tmp_path / f"{count}", data, num_workers=1)
        list(
            build_cache(tmp_path / "c", open_corpus(data), [spec], geometry="crop", options=OPTIONS)
        )
    store = open_cache(tmp_path / "c")["clip"]
    store.read([9, 16, 18])
    for used_in in (None, -1):
        monkeypatch.setattr("movekd.cache.tensorstore_rows._used_in", used_in)
        for row in (10, 15):
            with pytest.raises(CacheError, match=rf"row {row} of .* stands for no image: .*gap"):
                store.read([9, row])


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_checksum_refuses_a_flipped_byte_before_a_row_is_returned(
    stores, arrays, tmp_path, small_shards, compressor
) -> None:
    """And only in its own Zarr shard, in threads, and in a process that got the store by pickle."""
    shutil.copytree(stores[compressor].storage.local_dir, tmp_path / "cache")
    files = sorted((tmp_path / "cache" / "clip.zarr").glob("*/c/1/**/0"))
    files = [path for path in files if path.is_file()]
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        flip(path)
        store = open_cache(tmp_path / "cache", verify="checksum")["clip"]
        for each in (store, pickle.loads(pickle.dumps(store))):  # noqa: S301
            assert_equal(each.read([0, 23]).stored, arrays, [0, 23])
            with ThreadPoolExecutor(4) as pool:
                for error in pool.map(lambda row, s=each: caught(s, row), [8, 9, 15, 8]):
                    assert re.search(r"c/1/.* is damaged: .*its seal says", str(error))
        path.write_bytes(whole)
    assert_equal(open_cache(tmp_path / "cache", "checksum")["clip"].read([9]).stored, arrays, [9])


def caught(store, row):
    try:
        return store.read([row])
    except CorruptCacheError as error:
        return error


@pytest.mark.parametrize("compressor", ["none", "zstd"])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"\0" + data])
def test_a_file_of_another_size_is_refused_whatever_it_holds(
    stores, tmp_path, small_shards, compressor, change
) -> None:
    shutil.copytree(stores[compressor].storage.local_dir, tmp_path / "cache")
    path = tmp_path / "cache" / "clip.zarr" / "cls" / "c" / "2" / "0"
    path.write_bytes(change(path.read_bytes()))
    store = open_cache(tmp_path / "cache")["clip"]
    store.read([0])
    with pytest.raises(CorruptCacheError, match=r"cls/c/2/0 has \d+ bytes, its seal says \d+"):
        store.read([20])


def test_each_zarr_shard_is_compared_once(stores, small_shards, monkeypatch) -> None:
    store = open_cache(stores["none"].storage.local_dir, verify="checksum")["clip"]
    read = []
    monkeypatch.setattr(
        "movekd.cache.sealed_shards.blocks_of",
        lambda file: (read.append(file.fileno()), blocks_of(file))[1],
    )
    for _ in range(3):
        store.read([0, 1, 8])
    store.read([9, 20])
    assert len(read) == 3 * len(store.layout.arrays)


def test_a_teacher_of_another_cache_is_refused(
    stores, tmp_path, crops, tiny_specs, small_shards
) -> None:
    """Its group and seals, copied in: of as many images, other ones."""
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(crops[1:25]):
        image.rotate(90).save(images / f"{number:02d}.png")
    pack_folder(images, tmp_path / "data", num_workers=1)
    other = tmp_path / "other"
    list(build_cache(other, open_corpus(tmp_path / "data"), tiny_specs[:1], geometry="crop",
                     options=OPTIONS))  # fmt: skip
    mixed = tmp_path / "mixed"
    shutil.copytree(stores["none"].storage.local_dir, mixed)
    for folder in ("clip.zarr", "clip.seals"):
        shutil.rmtree(mixed / folder)
        shutil.copytree(other / folder, mixed / folder)
    with pytest.raises(CacheError, match=r"sealed for other images than index\.parquet lists"):
        open_cache(mixed)["clip"].read([3])
    with pytest.raises(CacheError, match=r"sealed for other images than index\.parquet lists"):
        status(open_contents(mixed))
    # one Zarr shard of it only: refused where it is read
    shutil.rmtree(mixed)
    shutil.copytree(stores["none"].storage.local_dir, mixed)
    for name in ("clip.seals/00001.json", *(
        path.relative_to(other).as_posix() for path in other.glob("clip.zarr/*/c/1/**/0")
        if path.is_file()
    )):  # fmt: skip
        shutil.copy(other / name, mixed / name)
    store = open_cache(mixed)["clip"]
    store.read([0, 23])
    with pytest.raises(CacheError, match="Zarr shards 1 were sealed for other images"):
        store.read([0, 9])
