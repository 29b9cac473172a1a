"""Builds in a real Ray cluster on this machine, whose workers, nodes and drivers get killed.

One test, the first, is not slow, and has all of it: each process of the test suite that runs one
here starts a cluster.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from builds import build
from movekd.cache import layout
from movekd.cache.storage import open_storage
from movekd.cache.verify import verify
from movekd.errors import CacheError
from movekd.extract.ray.cluster import RayCluster
from movekd.extract.ray.executor import RayExecutor
from s3 import s3_server

SITE = Path(__file__).parents[2] / "helpers" / "ray_site"
PYTHONPATH = os.pathsep.join([str(SITE), *filter(None, sys.path)])
SYSTEM = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
"""So that a lost node is noticed in seconds."""
PROGRESS = re.compile(r"(clip: \w+: \d+/\d+, .* s left\n)*")
"""All that a driver says on standard error; it must keep quiet about what Ray says."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray, which warns of itself and leaves files
places = pytest.mark.parametrize(
    "place", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)


@dataclass
class RunningCluster:
    """The cluster, the port of its client server, and the folder of its faults."""

    cluster: Any
    client_port: int
    faults: Path

    def add_node(self, **environment: str) -> Any:
        return self.cluster.add_node(num_cpus=1, env_vars={"MOVEKD_MORTAL": "1", **environment})


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def nodes(request, tmp_path_factory):
    """A head, where nothing is built, and two nodes with a CPU each."""
    if any("s3" in item.name for item in request.session.items if item.module is request.module):
        request.getfixturevalue("server")  # whose address the nodes find in their environment
    faults = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        patch.setenv("MOVEKD_FAULTS", str(faults))
        patch.setenv("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "1")
        RayCluster()  # sets the environment that makes Ray quiet, before it is loaded
        from ray.cluster_utils import Cluster

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        head = {"num_cpus": 0, "_system_config": SYSTEM, "ray_client_server_port": port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            running = RunningCluster(cluster, port, faults)
            for _ in range(2):
                running.add_node()
            yield running
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def connected(nodes):
    """A driver's connection to the cluster."""
    with RayCluster(nodes.cluster.address, num_decoders=0) as cluster:
        yield cluster


@pytest.fixture
def executor(connected):
    return RayExecutor(connected)


@pytest.fixture
def place(request, tmp_path, monkeypatch) -> str:
    """Where a cache is to be: a folder, or a prefix in the S3 server."""
    if request.param == "folder":
        return str(tmp_path / "cache")
    request.getfixturevalue("server").fail()
    monkeypatch.setattr("movekd.extract.locks.RENEW_S", 0.3)
    monkeypatch.setattr("movekd.extract.locks.STALE_S", 4.0)
    return f"s3://bucket/{uuid.uuid4().hex}/cache"


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Four rows a Zarr shard, as in the workers: six units of work of a teacher."""
    monkeypatch.setattr("movekd.cache.layout.MAX_SHARD_ROWS", 4)
    monkeypatch.setattr("movekd.cache.catalog.MAX_SHARD_ROWS", 4)


def begin(place: str | Path, undisturbed: dict[str, bytes]) -> None:
    """Make a cache without a sealed Zarr shard, whose calibrations are those of another."""
    storage = open_storage(place)
    for name, content in undisturbed.items():
        if not re.search(r"/c/\d+/|seals/\d|skipped", name):
            storage.write(name, [content])


def everything(place: str | Path) -> dict[str, bytes]:
    storage = open_storage(place)
    return {name: storage.read(name) for name in storage.sizes()}


@places
def test_other_versions_are_refused_and_who_is_killed_costs_time_alone(
    nodes, executor, place, tmp_path, corpus_dir, tiny_specs, small_shards
) -> None:
    """From nothing: a worker, the driver and all nodes are killed in the middle of Zarr shards."""
    spec, storage = tiny_specs[0], open_storage(place)
    build(tmp_path / "alone", corpus_dir, [spec])
    expected = everything(tmp_path / "alone")

    other = other_versions(tmp_path, timm="0.0.1", torch="9.9")
    node = nodes.add_node(PYTHONPATH=os.pathsep.join([str(other), PYTHONPATH]))
    has = r"it has timm 0\.0\.1 \(the driver has .*\), torch 9\.9 \(the driver has"
    with pytest.raises(CacheError, match=rf"^node .* \(Ray id {node.node_id[:8]}\): {has}"):
        build(place, corpus_dir, [spec], executor=executor)
    nodes.cluster.remove_node(node, allow_graceful=False)

    (nodes.faults / "kill-worker").write_text(r"clip\.zarr\.tokens\.c\.1\.")
    (nodes.faults / "hold").write_text(r"clip\.zarr\.tokens\.c\.[2345]\.")
    with drive(nodes.cluster.address, place, tmp_path, corpus_dir, spec) as driver:
        first = [layout.seal_name("clip", shard) for shard in (0, 1)]
        while not all(map(storage.exists, first)) and driver.poll() is None:
            threading.Event().wait(0.05)
        assert not (nodes.faults / "kill-worker").exists()
        driver.send_signal(signal.SIGKILL)
        said = driver.communicate()
    (nodes.faults / "hold").unlink()
    assert driver.returncode == -signal.SIGKILL, said
    assert PROGRESS.fullmatch(said[1])
    # its workers go on for a moment beside those of the next driver

    lost = nodes.cluster.list_all_nodes()[1:]
    for number in range(len(lost)):
        (nodes.faults / f"kill-node-{number}").write_text(r"clip\.zarr\.tokens\.c\.")
    with ThreadPoolExecutor(1) as thread:  # Ray starts nodes in the main thread alone
        built = thread.submit(build, place, corpus_dir, [spec], executor=executor)
        while list(nodes.faults.glob("kill-node*")) and not built.done():
            threading.Event().wait(0.05)
        nodes.add_node()
        built.result()
    for node in lost:
        nodes.cluster.remove_node(node, allow_graceful=False)
    assert not list(nodes.faults.iterdir())
    assert everything(place) == expected
    assert list(verify(place)) == []


def other_versions(folder: Path, **versions: str) -> Path:
    """Return a folder that makes interpreters find packages of other versions installed."""
    for package, version in versions.items():
        metadata = folder / "other" / f"{package}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder / "other"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_one_bar_counts_all_rows_and_nobody_else_may_begin(
    server, nodes, executor, place, corpus_dir, tiny_specs, undisturbed
) -> None:
    """Two teachers in S3, and a worker that is killed; every seal is put once."""
    (nodes.faults / "kill-worker").write_text(r"conv\.zarr\.tokens\.c\.1\.")
    begin(place, undisturbed)
    seen = []

    def progress(*call) -> None:
        seen.append(call)
        if len(seen) == 1:
            with pytest.raises(CacheError, match=rf"another build .*\(pid {os.getpid()} on "):
                build(place, corpus_dir, tiny_specs)

    summaries = build(place, corpus_dir, tiny_specs, executor=executor, progress=progress)
    assert not list(nodes.faults.iterdir())
    assert everything(place) == undisturbed
    assert [summary.images_built for summary in summaries] == [24, 24]
    assert seen == [("clip, conv: build", done, 48) for done in range(8, 49, 8)]
    puts = Counter(re.findall(r"PUT .*seals/\d+\.json", "\n".join(server.log())))
    assert len(puts) == 12
    assert set(puts.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_of_two_clusters_one_writes(
    server, nodes, place, tmp_path, corpus_dir, tiny_specs, small_shards
) -> None:
    """Each has its own head, nodes and driver; the second comes while the first is at work."""
    from ray.cluster_utils import Cluster

    spec, storage = tiny_specs[0], open_storage(place)
    build(tmp_path / "alone", corpus_dir, [spec])
    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": SYSTEM})
    try:
        for cluster in (nodes.cluster, other):
            for _ in range(2):
                cluster.add_node(num_cpus=1)
        assert other.address != nodes.cluster.address
        (nodes.faults / "hold").write_text(r"clip\.zarr\.tokens\.c\.[2345]\.")
        with drive(nodes.cluster.address, place, tmp_path, corpus_dir, spec) as first:
            while not storage.exists(layout.seal_name("clip", 0)) and first.poll() is None:
                threading.Event().wait(0.05)
            with drive(other.address, place, tmp_path, corpus_dir, spec) as second:
                said = second.communicate()
            assert second.returncode == 2, said
            assert re.search(rf"another build .*\(pid {first.pid} on ", said[1])
            (nodes.faults / "hold").unlink()
            said = first.communicate()
            assert first.returncode == 0, said
        with drive(other.address, place, tmp_path, corpus_dir, spec) as second:
            said = second.communicate()
        assert second.returncode == 0, said
    finally:
        other.shutdown()
    assert everything(place) == everything(tmp_path / "alone")
    puts = Counter(re.findall(r"PUT .*seals/\d+\.json", "\n".join(server.log())))
    assert len(puts) == 6
    assert set(puts.values()) == {1}


@pytest.mark.slow
def test_a_driver_outside_of_the_cluster(
    nodes, tmp_path, corpus_dir, tiny_specs, small_shards
) -> None:
    """As a client of the cluster's head."""
    address, out = f"ray://127.0.0.1:{nodes.client_port}", tmp_path / "cache"
    with drive(address, out, tmp_path, corpus_dir, tiny_specs[0]) as driver:
        said = driver.communicate()
    assert driver.returncode == 0, said
    assert PROGRESS.fullmatch(said[1])
    build(tmp_path / "alone", corpus_dir, tiny_specs[:1])
    assert everything(out) == everything(tmp_path / "alone")


def drive(address, out, folder, corpus_dir, spec) -> subprocess.Popen:
    """Start a build of one teacher in another process; decoders are what they are by default."""
    (folder / "clip.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [sys.executable, "-m", "movekd", "cache", "build", "--batch-size", "5"]
    command += ["--teacher", str(folder / "clip.yaml"), "--num-threads", "1"]
    command += ["--shards", str(corpus_dir), "--cache", str(out)]
    command += ["--engine", "ray", "--address", address, "--num-workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_cache_is_refused_by_name(
    nodes, executor, corpus_dir, tiny_specs, tmp_path
) -> None:
    out = tmp_path / "cache"
    node = nodes.add_node(MOVEKD_BLIND=str(out))
    expected = rf"it does not see the cache that the driver builds at {out}\. A cache"
    try:
        with pytest.raises(
            CacheError, match=rf"^node .* \(Ray id {node.node_id[:8]}\): {expected}"
        ):
            build(out, corpus_dir, tiny_specs, executor=executor)
    finally:
        nodes.cluster.remove_node(node, allow_graceful=False)
