"""Caches in S3, against a server process on the loopback interface that fails on demand."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import uuid

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from movekd.analysis.disk_benchmark import DiskRates
from movekd.analysis.plan import plan_cache
from movekd.cache import object_storage, tensorstore_rows
from movekd.cache.reader import open_cache
from movekd.cache.storage import open_storage
from movekd.cache.verify import status, verify
from movekd.corpus.index import open_corpus
from movekd.errors import CacheError, CorruptCacheError
from movekd.extract.locks import build_lock
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from s3 import everything, s3_server, upload

OPTIONS = BuildOptions(batch_size=5, num_workers=0)


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def prefix(server) -> str:
    """A fresh prefix, and no faults."""
    server.fail()
    return f"s3://bucket/{uuid.uuid4().hex}/cache"


@pytest.fixture
def quick_retries(monkeypatch) -> None:
    """Both clients give up early: waiting for more tests nothing."""
    monkeypatch.setattr(object_storage, "S3_ATTEMPTS", 1)
    few = {"s3_request_retries": {"max_retries": 3, "initial_delay": "1ms", "max_delay": "2ms"}}
    monkeypatch.setattr(tensorstore_rows, "_CONTEXT", tensorstore_rows._CONTEXT | few)


def build(url, corpus_dir, specs, **more):
    return list(
        build_cache(url, open_corpus(corpus_dir), specs, geometry="crop", options=OPTIONS, **more)
    )


def test_a_build_in_s3_is_the_local_one(
    prefix, corpus_dir, tiny_specs, cache_dir, small_shards, tmp_path
) -> None:
    build(prefix, corpus_dir, tiny_specs)
    build(tmp_path, corpus_dir, tiny_specs)
    assert everything(open_storage(prefix)) == everything(open_storage(tmp_path))
    assert list(verify(prefix)) == []
    remote, local = open_cache(prefix), open_cache(tmp_path)
    assert status(remote) == status(local)
    rows = [5, 23, 0, 9, 9, 17]
    for teacher in local:
        expected = local[teacher].read(rows).stored
        for name, values in remote[teacher].read(rows).stored.items():
            assert torch.equal(values, expected[name])


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_memory_and_file_urls_hold_the_same_cache(
    tmp_path, corpus_dir, tiny_specs, compressor
) -> None:
    spec = tiny_specs[0].with_changes(compressor=compressor)
    urls = [f"memory://{uuid.uuid4().hex}/cache", f"file://{tmp_path}/cache"]
    for url in urls:
        build(url, corpus_dir, [spec])
        assert list(verify(url)) == []
    memory, local = (open_cache(url)["clip"].read([3, 0, 3]).stored for url in urls)
    assert all(torch.equal(memory[name], local[name]) for name in local)


def test_interrupted_in_s3_and_run_again_equals_undisturbed(
    prefix, corpus_dir, tiny_specs, cache_dir, small_shards, tmp_path
) -> None:
    build(tmp_path, corpus_dir, tiny_specs[:1])
    for stop_at in (8, 14, 20):

        def interrupt(what, done, total, stop_at=stop_at):
            if what.endswith("build") and done >= stop_at:
                raise KeyboardInterrupt

        url = f"{prefix}{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            build(url, corpus_dir, tiny_specs[:1], progress=interrupt)
        build(url, corpus_dir, tiny_specs[:1])
        assert everything(open_storage(url)) == everything(open_storage(tmp_path))


@pytest.mark.parametrize("kind", ["500", "503", "truncated"])
def test_reads_are_tried_again(server, prefix, cache_dir, kind) -> None:
    upload(cache_dir, prefix)
    local = open_cache(cache_dir)["clip"].read([7, 1]).stored
    for match in ("cache.json", "index.parquet", "zarr.json", "calibration.json", "tokens/c"):
        server.fail(("GET", match, kind, 2))
        remote = open_cache(prefix)["clip"].read([7, 1]).stored
        assert all(torch.equal(remote[name], local[name]) for name in local), match
    server.fail(("GET", "/c/0", kind, 2))
    assert list(verify(prefix)) == []


@pytest.mark.parametrize("kind", ["500", "503", "500-after"])
def test_writes_are_tried_again(server, prefix, corpus_dir, tiny_specs, cache_dir, kind) -> None:
    server.fail(
        ("PUT", "tokens/c", kind, 2), ("PUT", "00000.json", kind, 1), ("PUT", ".lock", kind, 1),
        ("GET", "seals", "500", 1), ("DELETE", ".lock", "503", 1),
    )  # fmt: skip
    build(prefix, corpus_dir, tiny_specs)
    assert everything(open_storage(prefix)) == everything(open_storage(cache_dir))


def test_a_server_that_stays_broken_is_a_sentence(
    server, prefix, cache_dir, corpus_dir, tiny_specs, quick_retries
) -> None:
    upload(cache_dir, prefix)
    opened = open_cache(prefix)
    for kind in ("500", "503", "truncated"):
        server.fail(("GET", "tokens/c", kind, 10**6))
        with pytest.raises(CacheError, match=r"'clip' in s3://.*cannot be read.*several times"):
            opened["clip"].read([0])
    server.fail(("HEAD", "cache.json", "500", 10**6))
    for ask in (open_cache, lambda url: build(url, corpus_dir, tiny_specs)):  # not: no cache here
        with pytest.raises(CacheError, match=r"s3://.*cache\.json cannot be read: .*several times"):
            ask(prefix)
    server.fail(("GET", "cache.json", "500", 10**6))
    with pytest.raises(CacheError, match=r"s3://.*cache\.json cannot be read: .*several times"):
        open_cache(prefix)
    server.fail(("PUT", "00000.json", "503", 10**6))
    with pytest.raises(CacheError, match=r"00000\.json cannot be written: .*sealed is safe"):
        build(f"{prefix}2", corpus_dir, tiny_specs[:1])
    server.fail()
    build(f"{prefix}2", corpus_dir, tiny_specs)
    assert everything(open_storage(f"{prefix}2")) == everything(open_storage(cache_dir))


def test_endpoint_and_region_of_a_profile_are_those_of_the_rows_too(
    server, prefix, cache_dir, tmp_path, monkeypatch
) -> None:
    """As ``aws configure`` writes them, and not in the environment."""
    upload(cache_dir, prefix)
    config = f"[default]\nregion = us-east-1\nendpoint_url = {server.endpoint}\n"
    (tmp_path / "config").write_text(config)
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert tensorstore_rows.s3_settings()["endpoint"] == server.endpoint
    assert tensorstore_rows.s3_settings()["aws_region"] == "us-east-1"
    child = f"""
from movekd.cache.reader import open_cache
assert len(open_cache({prefix!r})["clip"].read([0, 5]).tokens_BND) == 2
"""
    subprocess.run([sys.executable, "-c", child], check=True)


def test_a_server_that_goes_away_is_not_called_damage(
    server, prefix, cache_dir, quick_retries, monkeypatch
) -> None:
    """Where rows are read through zarr as well: in a child forked from a reading process."""
    upload(cache_dir, prefix)
    opened = open_cache(prefix)["clip"]
    monkeypatch.setattr(tensorstore_rows, "_used_in", -1)
    assert len(opened.read([3]).tokens_BND) == 1
    server.fail(("GET", "clip.zarr", "500", 10**6), ("HEAD", "clip.seals", "500", 10**6))
    with pytest.raises(CacheError, match="several times") as caught:
        opened.read([3])
    assert not isinstance(caught.value, CorruptCacheError)


def test_a_bucket_that_does_not_exist_is_named(server, corpus_dir, tiny_specs) -> None:
    server.fail()
    with pytest.raises(CacheError, match=r"no bucket 'elsewhere'.*correct --cache"):
        build("s3://elsewhere/cache", corpus_dir, tiny_specs)


def test_flipped_truncated_and_missing_objects_are_found(prefix, cache_dir) -> None:
    upload(cache_dir, prefix)
    storage = open_storage(prefix)
    name = "clip.zarr/tokens/c/0/0/0"
    whole = storage.read(name)
    storage.write(name, [bytes([whole[0] ^ 1]), whole[1:]])
    assert [p for p in verify(prefix) if f"{name} is damaged" in p]
    storage.write(name, [whole[: len(whole) // 2]])
    assert [p for p in verify(prefix) if f"{name} is damaged" in p]
    with pytest.raises(CorruptCacheError, match="Run `movekd cache verify`"):
        open_cache(prefix)["clip"].read([20])
    storage.delete(name)
    assert [p for p in verify(prefix) if f"{name} is missing" in p]
    with pytest.raises(CorruptCacheError, match="Run `movekd cache verify`"):
        open_cache(prefix)["clip"].read([20])


def test_a_row_costs_one_request_an_array(server, prefix, cache_dir) -> None:
    """Once the indexes of its Zarr shards are known."""
    upload(cache_dir, prefix)
    store = open_cache(prefix)["clip"]
    store.read([0])
    server.fail()
    store.read([5, 9, 2])
    assert len([line for line in server.log() if "/c/" in line]) == 3 * len(store.layout.arrays)


class Stored(Dataset):
    def __init__(self, store) -> None:
        self.store = store

    def __getitem__(self, row):
        return self.store.read([row]).stored

    def __len__(self) -> int:
        return 24


def first(batch):
    return batch[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("has_read", [False, True])
def test_forked_and_spawned_workers_read_from_s3(prefix, cache_dir, method, has_read) -> None:
    """Also where the parent has read rows already, which TensorStore does not survive."""
    upload(cache_dir, prefix)
    store = open_cache(prefix)["clip"]
    expected = open_cache(cache_dir)["clip"].read(range(24)).stored
    if has_read:
        store.read([0])
    num_workers = 2 if method == "fork" else 1  # a spawned one imports torch, for seconds
    loader = DataLoader(
        Stored(store), num_workers=num_workers, collate_fn=first, multiprocessing_context=method
    )
    for row, stored in enumerate(loader):
        for name, values in stored.items():
            assert torch.equal(values[0], expected[name][row])


HOLD = """
import sys
from movekd.extract import locks
from movekd.extract.locks import build_lock
locks.RENEW_S = 0.05
from movekd.cache.storage import open_storage
with build_lock(open_storage(sys.argv[1]), "clip.seals/.part-0-of-1.lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(prefix):
    """Another process that holds the lock of clip in S3."""
    command = [sys.executable, "-c", HOLD, prefix]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_build_in_s3_is_refused_and_a_dead_one_taken_over(
    prefix, holder, corpus_dir, tiny_specs, cache_dir, monkeypatch
) -> None:
    monkeypatch.setattr("movekd.extract.locks.RENEW_S", 0.05)
    monkeypatch.setattr("movekd.extract.locks.STALE_S", 1.0)
    with pytest.raises(CacheError, match=rf"another build .*\(pid {holder.pid} on "):
        build(prefix, corpus_dir, tiny_specs[:1])
    holder.kill()
    holder.wait()
    build(prefix, corpus_dir, tiny_specs)
    assert everything(open_storage(prefix)) == everything(open_storage(cache_dir))


def test_a_pid_decides_nothing(prefix, monkeypatch) -> None:
    """Containers share host names and pids: a holder is dead when it renews no more."""
    monkeypatch.setattr("movekd.extract.locks.RENEW_S", 0.05)
    monkeypatch.setattr("movekd.extract.locks.STALE_S", 0.5)
    storage = open_storage(prefix)
    mark = {"holder": f"pid {os.getpid()} on {socket.gethostname()}", "token": "t", "renewed": 0}
    storage.write(".lock.0", [json.dumps(mark).encode()])
    with build_lock(storage, ".lock"):
        assert list(storage.sizes()) == [".lock.1"]


def test_a_holder_on_another_host_lives_as_long_as_it_renews(prefix, monkeypatch) -> None:
    monkeypatch.setattr("movekd.extract.locks.RENEW_S", 0.05)
    monkeypatch.setattr("movekd.extract.locks.STALE_S", 0.5)
    storage = open_storage(prefix)
    name = "clip.seals/.lock.3"
    stop = threading.Event()

    def renew() -> None:
        renewed = 0
        while not stop.wait(0.05):
            renewed += 1
            content = {"holder": "pid 1 on elsewhere", "token": "t", "renewed": renewed}
            open_storage(prefix).write(name, [json.dumps(content).encode()])

    thread = threading.Thread(target=renew)
    thread.start()
    while not storage.exists(name):
        pass
    with (
        pytest.raises(CacheError, match=r"\(pid 1 on elsewhere\)"),
        build_lock(storage, "clip.seals/.lock"),
    ):
        pass
    stop.set()
    thread.join()
    with build_lock(storage, "clip.seals/.lock"):
        assert list(storage.sizes("clip.seals")) == ["clip.seals/.lock.4"]
    assert storage.sizes("clip.seals") == {}


def test_a_lock_is_found_without_listing_the_seals(prefix, server) -> None:
    """A hundred thousand seals lie beside the locks of their Zarr shards."""
    storage = open_storage(prefix)
    name = "clip.seals/.00012.lock"
    for other in ["clip.seals/00012.json", f"{name}.7", f"{name}.7/below", f"{name}s.1"]:
        storage.write(other, [b"{}"])
    server.fail()
    assert storage.starting_with(f"{name}.") == [f"{name}.7"]
    listings = [line for line in server.log() if "list-type=2" in line]
    assert listings
    assert all(f"prefix={prefix.partition('bucket/')[2]}/{name}." in line for line in listings)


@pytest.mark.parametrize("dead", [None, 0, 3])
def test_of_many_who_want_the_lock_one_holds_it(prefix, monkeypatch, dead) -> None:
    """From nothing, and from a dead holder whose number comes again once all are gone."""
    monkeypatch.setattr("movekd.extract.locks.RENEW_S", 0.05)
    monkeypatch.setattr("movekd.extract.locks.STALE_S", 1.0)
    storage = open_storage(prefix)
    if dead is not None:
        mark = {"holder": "pid 1 on elsewhere", "token": "t", "renewed": 0}
        storage.write(f".lock.{dead}", [json.dumps(mark).encode()])
    together, holders, most = threading.Lock(), [], []

    def take() -> None:
        with build_lock(storage, ".lock", wait=True):
            with together:
                holders.append(1)
                most.append(len(holders))
            for _ in range(40):  # long enough for the others to come upon it
                storage.sizes()
            with together:
                holders.pop()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_a_plan_counts_the_requests_of_a_build_and_of_a_training(
    server, prefix, corpus_dir, tiny_specs, small_shards
) -> None:
    planned = plan_cache(
        tiny_specs,
        open_corpus(corpus_dir),
        prefix,
        options=OPTIONS,
        assumed_rates=dict.fromkeys(("clip", "conv"), 1.0),
        assumed_disk=DiskRates(None, 1e12, "assumed"),
    )

    def features(method: str) -> int:
        """Requests for Zarr shards and seals, in the log."""
        asked = [line for line in server.log() if line.startswith(method)]
        names = r"(/c/\d+(/0)+|\.seals/\d{5}\.json)( |$)"
        return sum(bool(re.search(names, line)) and "/channel_" not in line for line in asked)

    build(prefix, corpus_dir, tiny_specs)
    assert features("PUT ") == planned.needs.put_requests
    cache = open_cache(prefix)
    server.fail()
    for teacher in cache:
        cache[teacher].require_images(cache.catalog)
        for row in range(24):
            cache[teacher].read([row])
    assert features("GET ") == planned.needs.get_requests
