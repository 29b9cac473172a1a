"""What is asked of a cluster, and what is refused, over a stand-in for Ray."""

import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from movekd.errors import ConfigError
from movekd.extract.ray.cluster import RayCluster


@pytest.fixture
def measured(monkeypatch):
    """A function that connects to a cluster of nodes with so many (CPUs, GPUs)."""

    def connect(*nodes, address="auto", **asked):
        found = [
            {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}}
            for cpus, gpus in nodes
        ]
        found += [{"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}]
        found += [{"Alive": True, "Resources": {"memory": 1}}]  # a head where nothing shall run
        ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: found)
        monkeypatch.setattr("movekd.extract.ray.cluster._import_ray", lambda _: ray)
        with RayCluster(address, **asked) as cluster:
            return cluster.device, cluster.num_workers(), cluster.num_gpus, cluster.num_decoders

    return connect


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([(16, 0), (8, 0)], {}, ("cpu", 2, 0, 11)),
        ([(1, 0)], {}, ("cpu", 1, 0, 1)),
        ([(96, 8), (32, 0)], {}, ("cuda", 8, 1, 11)),  # what a node without GPUs has is no help
        ([(96, 8), (48, 4)], {"num_gpus_per_worker": 0.1}, ("cuda", 120, 0.1, 1)),
        ([(96, 8), (48, 4)], {"num_gpus_per_worker": 3}, ("cuda", 3, 3, 47)),
        ([(96, 8), (48, 4)], {"num_gpus_per_worker": 0}, ("cpu", 2, 0, 71)),
        ([(96, 8)], {"device": "cpu", "num_workers": 5}, ("cpu", 5, 0, 18)),
        ([(96, 8)], {"num_workers": 99, "num_decoders": 3}, ("cuda", 99, 1, 3)),
    ],
)
def test_what_a_worker_gets(measured, nodes, asked, expected) -> None:
    assert measured(*nodes, **asked) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"num_workers": 0}, r"--num-workers is 0; .*at least 1"),
        ({"device": "cuda:1"}, r"--device cuda:1 with --engine ray"),
        ({"device": "cpu", "num_gpus_per_worker": 1}, r"contradict each other"),
        ({"device": "cuda", "num_gpus_per_worker": 0}, r"contradict each other"),
        ({"num_gpus_per_worker": 1.5}, r"whole GPUs or a fraction of one"),
        ({"num_gpus_per_worker": 8}, r"1 CPU and 8 GPUs, .*most GPUs of a node are 4\. Give"),
    ],
)
def test_what_does_not_fit_is_a_sentence(measured, asked, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        measured((48, 4), **asked)


def test_a_cluster_without_a_place_is_a_sentence(measured) -> None:
    with pytest.raises(ConfigError, match=r"1 CPU and 0 GPUs, and no node .*or add nodes"):
        measured((0, 0))


@pytest.mark.parametrize("address", ["somewhere", "ray://head", "head:port", ""])
def test_what_is_no_address_is_a_sentence(monkeypatch, address) -> None:
    ray = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr("movekd.extract.ray.cluster._import_ray", lambda _: ray)
    expected = rf"--address is '{re.escape(address)}'; expected auto, local, HOST:PORT or ray://"
    with pytest.raises(ConfigError, match=expected), RayCluster(address):
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nobody_answers_is_a_sentence(monkeypatch, scheme) -> None:
    ray = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr("movekd.extract.ray.cluster._import_ray", lambda _: ray)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=r"nobody answers there .*`ray start --head`"):
        RayCluster(address).__enter__()


@pytest.mark.parametrize(("failures", "is_connected"), [(0, True), (2, True), (3, False)])
def test_a_server_for_clients_that_died_at_once_is_asked_again(
    monkeypatch, failures, is_connected
) -> None:
    """Ray 2.60 forks one per client while its threads work: beside busy processes 3 of 44 died."""
    tries = []

    def init(**options) -> None:
        tries.append(options["address"])
        if len(tries) <= failures:
            raise ConnectionAbortedError("Initialization failure from server:\nTraceback")

    node = {"Alive": True, "Resources": {"CPU": 2}}
    ray = SimpleNamespace(
        is_initialized=lambda: False, init=init, shutdown=lambda: None, nodes=lambda: [node]
    )
    monkeypatch.setattr("movekd.extract.ray.cluster._import_ray", lambda _: ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        if is_connected:
            with RayCluster(address) as cluster:
                assert cluster.num_workers() == 1
        else:
            with pytest.raises(ConfigError, match="Initialization failure from server"):
                RayCluster(address).__enter__()
    assert tries == [address] * min(failures + 1, 3)


def test_ray_that_is_not_installed_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray, .*pip install 'movekd\[ray\]'"):
        RayCluster()


def test_a_build_without_ray_does_not_load_it() -> None:
    code = "import sys, movekd.cli.cache, movekd.extract.run; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
