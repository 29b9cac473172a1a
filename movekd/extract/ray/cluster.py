"""A Ray cluster as a build sees it: how it is reached, what it has, whether its nodes are alike.

Comes in: what the command line says of the cluster. Goes out: a connection, and how many workers of
which size there are to be. ``extract.ray.executor`` puts them to work.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from types import TracebackType
from typing import IO, Any, Self

from movekd.errors import CacheError, ConfigError
from movekd.extract.ray import environment
from movekd.extract.ray.environment import NodeEnvironment, node_name

WORKER_CPUS = 1
"""What a worker claims of Ray, so that each node without GPUs holds workers as it has cores."""
_CONNECT_S = 10.0
_CLIENT_TRIES = 3


class RayCluster:
    """A connection to a Ray cluster, and what each worker of a build gets of it.

    A context manager. A cluster that this process is connected to already is taken, and stays so.

    Args:
        address: ``auto`` (the cluster that this machine is a node of), ``host:port``,
            ``ray://host:port``, or ``local`` (this machine alone).
        num_workers: how many, at most; unless given one a GPU, or one a node without GPUs, of the
            nodes that there are at the moment.
        num_gpus_per_worker: may be a fraction; unless given 1 where the device is a GPU.
        num_decoders: processes that decode images, of each worker; unless given the cores that
            there are for each, but one.
        device: ``auto``, ``cpu`` or ``cuda``.
        is_verbose: whether Ray's own messages are shown.

    Attributes:
        device: cpu or cuda.
        num_gpus: of each worker.
        num_decoders: of each worker.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers; or no worker would fit into it.
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
        self._left = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as left:
            if not self.ray.is_initialized():
                self._connect()
                left.callback(self.ray.shutdown)
                if not self.is_verbose:  # Ray prints there that a node was lost
                    left.enter_context(redirect_stdout(left.enter_context(_nowhere())))
            self._take_measure()
            self._left = left.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.close()

    def _connect(self) -> None:
        _require_answer(self._address)
        level = logging.INFO if self.is_verbose else logging.CRITICAL
        own = {"include_dashboard": False} if self._address == "local" else {}
        try:
            with nullcontext() if self.is_verbose else _no_stderr():
                self._init(log_to_driver=self.is_verbose, logging_level=level, **own)
        except Exception as error:  # of many kinds, by version and address
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"no Ray cluster can be used at --address {self._address}: {said} Start one with "
                "`ray start --head` (and `ray start --address HOST:6379` on the other machines), "
                "or give --address local for this machine alone."
            ) from None

    def _init(self, **options: Any) -> None:
        """Connect, again where Ray's server for clients lost the process that it forked for us.

        It forks while its threads are busy; now and then the child dies at once.
        """
        for left in reversed(range(_CLIENT_TRIES)):
            try:
                self.ray.init(address=self._address, **options)
                return
            except ConnectionAbortedError:
                if not left or not self._address.startswith("ray://"):
                    raise

    def _nodes(self) -> list[dict[str, Any]]:
        """Return the living nodes that have room for a worker when nothing else runs there."""
        return [
            node
            for node in self.ray.nodes()
            if node["Alive"] and _has(node, "CPU") >= WORKER_CPUS
            if _has(node, "GPU") >= self.num_gpus
        ]

    def _take_measure(self) -> None:
        """Settle what each worker has."""
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
                "other: a worker sees the GPUs that it claims. Leave one of the two out."
            )
        if num_gpus > 1 and num_gpus % 1:
            raise ConfigError(
                f"--num-gpus-per-worker is {num_gpus:g}; Ray gives whole GPUs, or a part of one."
            )
        self.num_gpus = num_gpus
        if not self._nodes():
            raise ConfigError(
                f"a worker takes {WORKER_CPUS} CPU and {num_gpus:g} GPUs, and no node of the "
                f"cluster at --address {self._address} has them; the most GPUs of a node are "
                f"{most_gpus:g}. Give --num-gpus-per-worker 0 to build on CPUs, or add nodes."
            )
        if num_decoders is None:
            cpus = sum(_has(node, "CPU") for node in self._nodes())
            num_decoders = max(int(cpus / self.num_places()) - 1, 1)
        self.num_decoders = num_decoders

    def num_places(self) -> int:
        """Return how many workers there are to be at the moment; nodes come and go."""
        if self._asked[0] is not None:
            return self._asked[0]
        nodes = self._nodes()
        if not self.num_gpus:
            return max(len(nodes), 1)
        return max(sum(int(_has(node, "GPU") / self.num_gpus + 1e-6) for node in nodes), 1)

    def require_alike(self, expected: NodeEnvironment) -> None:
        """Look around on every node; one that joins later is looked at by its workers."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self.ray.remote(num_cpus=0, max_retries=0)(environment.probe_node())
        nodes, exceptions = self._nodes(), self.ray.exceptions
        asked = [
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(asdict(expected), list(environment.PACKAGES))
            for node in nodes
        ]
        for node, answer in zip(nodes, asked, strict=True):
            name = node_name(node["NodeManagerHostname"], node["NodeID"])
            try:
                found = self.ray.get(answer)
            except (
                exceptions.TaskUnschedulableError,
                exceptions.WorkerCrashedError,
                exceptions.NodeDiedError,
            ):
                continue  # the node has just gone
            try:
                environment.require_versions(found["versions"], expected.versions)
            except CacheError as error:
                raise CacheError(f"{name}: {error}") from None
            if found["problem"] is not None:
                raise CacheError(f"{name}: {found['problem']}")

    @contextmanager
    def sentences(self) -> Iterator[None]:
        """Turn what becomes of a cluster into a sentence."""
        try:
            yield
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = lines[-1] if lines else type(error).__name__
            failure = CacheError(
                f"the Ray cluster could not go on ({type(error).__name__}: {said[:300]}). What is "
                "sealed is safe; see that its nodes are up and run the same command again."
            )
            failure.add_note(str(error))
            raise failure from None


def _has(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0))


def _import_ray(is_verbose: bool) -> Any:
    """Return Ray, told to be quiet before it is loaded and would not listen any more."""
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


def _nowhere() -> IO[str]:
    return open(os.devnull, "w")


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what the compiled part of Ray says while it starts; that it was told to be quiet."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _require_answer(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself tries for minutes, then ends the process.

    Raises:
        ConfigError: it is no address, or nobody answers.
    """
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
            "`ray start --head`, which prints its address; or give --address local for this "
            "machine alone."
        ) from None
