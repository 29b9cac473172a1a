"""Connect to a Ray cluster, size its workers, and check that its nodes are equal.

Input: the options of the command line. Output: a connection, and the number and size of workers.
``extract.ray.executor`` gives them work.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from typing import Any, Self

from movekd.errors import CacheError, ConfigError
from movekd.extract.ray import environment
from movekd.extract.ray.environment import NodeEnvironment, node_name

WORKER_CPUS = 1
"""CPUs that a worker asks Ray for; a node without GPUs then holds as many workers as cores."""
_CONNECT_S = 10.0
_CLIENT_TRIES = 3


class RayCluster:
    """A connection to a Ray cluster, and the size of a build's workers.

    A context manager. If this process is connected to a cluster already, that connection is used
    and stays open.

    Args:
        address: ``auto`` (the cluster that this machine is a node of), ``host:port``,
            ``ray://host:port``, or ``local`` (only this machine).
        num_workers: maximum number of workers. Default: one per GPU, or one per node in a cluster
            without GPUs, counted over the nodes that are alive.
        num_gpus_per_worker: may be a fraction. Default: 1 if the device is a GPU.
        num_decoders: processes per worker that decode images. Default: all cores of the worker's
            share but one.
        device: ``auto``, ``cpu`` or ``cuda``.
        is_verbose: whether to show Ray's own messages.

    Attributes:
        device: cpu or cuda.
        num_gpus: GPUs per worker.
        num_decoders: decoding processes per worker.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or no worker fits into it.
    """

    def __init__(
        self,
        address: str = "auto",
        *,
        num_workers: int | None = None,
        num_gpus_per_worker: float | None = None,
        num_decoders: int | None = None,
        device: str = "auto",
        is_verbose: bool = False,
    ) -> None:
        self._address, self.is_verbose = address, is_verbose
        self._asked = num_workers, num_gpus_per_worker, num_decoders
        self.device = device
        self.ray: Any = _import_ray(is_verbose)
        self.num_gpus, self.num_decoders = 0.0, 1
        self._on_exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as on_exit:
            if not self.ray.is_initialized():
                self._connect()
                on_exit.callback(self.ray.shutdown)
                if not self.is_verbose:  # Ray prints lost nodes to stdout
                    devnull = on_exit.enter_context(open(os.devnull, "w"))
                    on_exit.enter_context(redirect_stdout(devnull))
            self._size_workers()
            self._on_exit = on_exit.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._on_exit.close()

    def _connect(self) -> None:
        _require_answer(self._address)
        level = logging.INFO if self.is_verbose else logging.CRITICAL
        own = {"include_dashboard": False} if self._address == "local" else {}
        try:
            with nullcontext() if self.is_verbose else _no_stderr():
                self._init(log_to_driver=self.is_verbose, logging_level=level, **own)
        except Exception as error:  # its class depends on Ray's version and on the address
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"no Ray cluster can be used at --address {self._address}: {said} Start one with "
                "`ray start --head` (and `ray start --address HOST:6379` on the other machines), "
                "or give --address local to use only this machine."
            ) from None

    def _init(self, **options: Any) -> None:
        """Connect; retry if Ray's client server loses the process that it forks for a client.

        The server forks while its threads are busy, so the child sometimes dies at once.
        """
        for left in reversed(range(_CLIENT_TRIES)):
            try:
                self.ray.init(address=self._address, **options)
                return
            except ConnectionAbortedError:
                if not left or not self._address.startswith("ray://"):
                    raise

    def _nodes(self) -> list[dict[str, Any]]:
        """Return the living nodes that can hold a worker when nothing else runs on them."""
        return [
            node
            for node in self.ray.nodes()
            if node["Alive"] and _has(node, "CPU") >= WORKER_CPUS
            if _has(node, "GPU") >= self.num_gpus
        ]

    def _size_workers(self) -> None:
        most_gpus = max((_has(node, "GPU") for node in self._nodes()), default=0)
        num_workers, num_gpus, num_decoders = self._asked
        if num_workers is not None and num_workers < 1:
            raise ConfigError(f"--num-workers is {num_workers}; --engine ray needs at least 1.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"--device {self.device} with --engine ray: Ray decides which device a worker "
                "sees. Give cpu, cuda or auto, and --num-gpus-per-worker."
            )
        if num_gpus is None:
            num_gpus = float(self.device == "cuda" or (self.device == "auto" and most_gpus > 0))
        if self.device == "auto":
            self.device = "cuda" if num_gpus else "cpu"
        if (self.device == "cuda") != bool(num_gpus):
            raise ConfigError(
                f"--device {self.device} and --num-gpus-per-worker {num_gpus:g} contradict each "
                "other: a worker sees only the GPUs that it asks for. Leave one of the two out."
            )
        if num_gpus > 1 and num_gpus % 1:
            raise ConfigError(
                f"--num-gpus-per-worker is {num_gpus:g}; Ray gives whole GPUs or a fraction of "
                "one. Give a whole number, or one below 1."
            )
        self.num_gpus = num_gpus
        if not self._nodes():
            raise ConfigError(
                f"a worker needs {WORKER_CPUS} CPU and {num_gpus:g} GPUs, and no node of the "
                f"cluster at --address {self._address} has them; the most GPUs of a node are "
                f"{most_gpus:g}. Give --num-gpus-per-worker 0 to build on CPUs, or add nodes."
            )
        if num_decoders is None:
            cpus = sum(_has(node, "CPU") for node in self._nodes())
            num_decoders = max(int(cpus / self.num_workers()) - 1, 1)
        self.num_decoders = num_decoders

    def num_workers(self) -> int:
        """Return the number of workers for the nodes that are alive now."""
        if self._asked[0] is not None:
            return self._asked[0]
        nodes = self._nodes()
        if not self.num_gpus:
            return max(len(nodes), 1)
        return max(sum(int(_has(node, "GPU") / self.num_gpus + 1e-6) for node in nodes), 1)

    def require_alike(self, expected: NodeEnvironment) -> None:
        """Check every node; the workers of a node that joins later check it themselves."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = self.ray.remote(num_cpus=0, max_retries=0)(probe_node())
        nodes, exceptions = self._nodes(), self.ray.exceptions
        asked = [
            probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(asdict(expected))
            for node in nodes
        ]
        for node, answer in zip(nodes, asked, strict=True):
            name = node_name(node["NodeManagerHostname"], node["NodeID"])
            try:
                versions, problem = self.ray.get(answer)
            except (
                exceptions.TaskUnschedulableError,
                exceptions.WorkerCrashedError,
                exceptions.NodeDiedError,
            ):
                continue  # the node has just left
            try:
                environment.require_versions(versions, expected.versions)
            except CacheError as error:
                raise CacheError(f"{name}: {error}") from None
            if problem is not None:
                raise CacheError(f"{name}: {problem}")

    @contextmanager
    def errors_as_messages(self) -> Iterator[None]:
        """Turn Ray's errors into a CacheError of one line."""
        try:
            yield
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = lines[-1] if lines else type(error).__name__
            failure = CacheError(
                f"the Ray cluster failed ({type(error).__name__}: {said[:300]}). What is sealed is "
                "safe; see that its nodes are up and run the same command again."
            )
            failure.add_note(str(error))
            raise failure from None


def probe_node() -> Callable[[dict[str, Any]], tuple[dict[str, str | None], str | None]]:
    """Return a function: fields of a NodeEnvironment -> versions of a node, and another problem."""
    read_versions = environment.version_reader()

    def probe(expected: dict[str, Any]) -> tuple[dict[str, str | None], str | None]:
        versions = read_versions(list(expected["versions"]))
        if versions == expected["versions"]:  # only then may the node's movekd be imported
            from movekd.errors import MovekdError
            from movekd.extract.ray.environment import NodeEnvironment, check_visible

            try:
                check_visible(NodeEnvironment(**expected))
            except MovekdError as error:
                return versions, str(error)
        return versions, None

    return probe


def _has(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0))


def _import_ray(is_verbose: bool) -> Any:
    """Import Ray after setting the variables that make it quiet; it reads them only at import."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not is_verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--engine ray needs Ray, which is not installed; run pip install 'movekd[ray]'."
        ) from None
    return ray


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop stderr while Ray starts: its compiled part writes there whatever Python redirects."""
    kept, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(devnull)


def _require_answer(address: str) -> None:
    """Refuse an address where nobody listens; Ray would try for minutes, then end the process."""
    if address in ("auto", "local"):
        return
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal():
        raise ConfigError(
            f"--address is '{address}'; expected auto, local, HOST:PORT or ray://HOST:PORT."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: nobody answers there ({error}). Start a cluster with "
            "`ray start --head`, which prints its address; or give --address local to use only "
            "this machine."
        ) from None
