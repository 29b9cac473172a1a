"""Both kinds of storage pass one contract; test_s3.py tests S3."""

import os
import pickle
import resource
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.cache.storage import LocalStorage, open_storage
from movekd.errors import CacheError, ConfigError

names = st.lists(st.sampled_from(["a", "b.zarr", "c", "0"]), min_size=1, max_size=3).map("/".join)


@pytest.fixture(params=["folder", "file", "memory"])
def storage(request, tmp_path):
    urls = {"folder": f"{tmp_path}/cache", "file": f"file://{tmp_path}/cache"}
    return open_storage(urls.get(request.param, f"memory://{uuid.uuid4().hex}/cache"))


def test_what_is_written_is_read_listed_and_deleted(storage) -> None:
    assert storage.sizes() == {}
    assert storage.folders() == []
    assert not storage.exists("a/b")
    storage.write("a/b", [b"12", memoryview(b"3"), b""])
    storage.write("a/d/c", [])
    storage.write("top", [b"t"])
    assert storage.read("a/b") == b"123"
    assert b"".join(storage.blocks("a/b")) == b"123"
    assert storage.read_many(["top", "none", "a/b"]) == {"top": b"t", "a/b": b"123"}
    assert storage.sizes() == {"a/b": 3, "a/d/c": 0, "top": 1}
    assert storage.sizes("a/d") == {"a/d/c": 0}
    assert storage.sizes("none") == {}
    assert storage.folders() == ["a"]
    assert storage.exists("a/b")
    assert not storage.exists("a")
    storage.write("a/b", [b"new"])
    assert storage.read("a/b") == b"new"
    storage.delete("a/b")
    storage.delete("a/b")
    assert storage.sizes() == {"a/d/c": 0, "top": 1}
    storage.delete_folder("a")
    storage.delete_folder("a")
    assert storage.sizes() == {"top": 1}
    for read in (storage.read, lambda name: list(storage.blocks(name))):
        with pytest.raises(FileNotFoundError):
            read("a/b")
    assert pickle.loads(pickle.dumps(storage)).read("top") == b"t"  # noqa: S301


@given(st.dictionaries(names, st.binary(max_size=9), max_size=5))
def test_a_folder_and_memory_agree(tmp_path_factory, files) -> None:
    local = open_storage(tmp_path_factory.mktemp("s"))
    memory = open_storage(f"memory://{uuid.uuid4().hex}")
    kept = {n: c for n, c in files.items() if not any(o.startswith(f"{n}/") for o in files)}
    for name, content in kept.items():
        local.write(name, [content])
        memory.write(name, [content])
    assert local.sizes() == memory.sizes() == {n: len(kept[n]) for n in sorted(kept)}
    assert local.folders() == memory.folders()
    for folder in ["", *local.folders(), "nowhere"]:
        right_there = [n for n in kept if n.rpartition("/")[0] == folder]
        assert local.files(folder) == memory.files(folder) == sorted(right_there)
    assert local.read_many(list(kept)) == memory.read_many(list(kept)) == kept


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_file_is_created_once(tmp_path: Path, place: str) -> None:
    storage = open_storage(tmp_path if place == "folder" else f"memory://{uuid.uuid4().hex}")
    assert storage.create("lock", b"mine")
    assert storage.create("lock", b"mine")  # a repeated PUT finds itself
    assert not storage.create("lock", b"theirs")
    assert storage.read("lock") == b"mine"


def test_a_full_disk_is_a_sentence_and_keeps_the_old_file(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("a", [b"old"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CacheError, match=r"a cannot be written: File too large.*run the same"):
            storage.write("a", [bytes(900), bytes(900)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert storage.read("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("file", [])
    with pytest.raises(CacheError, match="cannot be written"):
        storage.write("file/under/a", [b"x"])


def test_leftovers_of_one_name_are_deleted_and_no_others(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for name in (".clip.zarr.tokens.c.0.7.tmp", ".clip2.zarr.tokens.c.0.7.tmp", "clip.zarr"):
        (tmp_path / name).touch()
    storage.delete_leftovers("clip.zarr")
    assert sorted(os.listdir(tmp_path)) == [".clip2.zarr.tokens.c.0.7.tmp", "clip.zarr"]


@pytest.mark.parametrize("url", ["s3://", "gs:///", "memory://"])
def test_a_url_without_a_bucket_is_refused(url) -> None:
    with pytest.raises(ConfigError, match=r"names no bucket; expected .*://BUCKET/PREFIX"):
        open_storage(url)


def test_a_client_that_is_not_installed_is_named(monkeypatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError

    monkeypatch.setattr("movekd.cache.object_storage.url_to_fs", missing)
    with pytest.raises(CacheError, match=r"client for gs:// .*pip install 'movekd\[gs\]'"):
        open_storage("gs://bucket/cache")


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ConfigError, match=r"scheme 'ftp://'; expected .*s3://, gs://, memory://"):
        open_storage("ftp://host/cache")


@pytest.mark.parametrize("name", ["caf\udce9", "a\0b"])
def test_a_name_that_is_no_text_is_a_sentence(name) -> None:
    with pytest.raises(
        ConfigError, match=r"cache's name .*is no UTF-8 text.* Rename the folder"
    ) as e:
        open_storage(name)
    str(e.value).encode()
