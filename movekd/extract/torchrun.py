"""Build a cache with all GPUs of a node: one process per GPU, started by torchrun.

    torchrun --nproc-per-node 8 -m movekd cache build ...

Rank 0 is the build: it holds the locks, calibrates, decides which Zarr shards lack, and prints. It
divides them into blocks of 1,024 rows, as ``extract.partition`` does, and the ranks take turns at
those. The others wait for their share and run the local executor (``build_share``).

Several nodes work alike, if all of them see the corpus and the cache. Their number is fixed: a
cluster whose nodes come and go is ``extract.ray``.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from movekd.cache import layout
from movekd.cache.spec import CacheSpec
from movekd.cache.writer import TeacherWriter
from movekd.distributed import Rank
from movekd.errors import CacheError, ConfigError, MovekdError
from movekd.extract.executor import JobResult, LocalExecutor
from movekd.extract.options import BuildContext, BuildOptions
from movekd.extract.rank_store import POLL_S, RankStore
from movekd.extract.ray.environment import NodeEnvironment, driver_environment
from movekd.extract.ray.worker import Assignment, open_context
from movekd.extract.shard_buffer import shard_tasks
from movekd.extract.teacher_loop import TeacherJob
from movekd.threads import num_cpus

Share = dict[str, list[int]]
"""What one rank builds: teacher -> Zarr shards."""


def require_torchrun_options(
    rank: Rank, *, partition: str | None, engine: str, overwrite: bool
) -> None:
    """Refuse what divides the work a second time, and what a restart by torchrun would repeat.

    Raises:
        ConfigError: says which option to leave out.
    """
    if overwrite and (rank.max_restarts or rank.local_world_size < rank.world_size):
        raise ConfigError(
            "--overwrite deletes the features, and torchrun starts this command again after a "
            "failure (--max-restarts) or when a node joins, which would delete those that were "
            "built meanwhile. Give --overwrite on one node with --max-restarts 0, or build into "
            "another --cache."
        )
    if rank.world_size == 1:
        return
    if partition is not None:
        raise ConfigError(
            f"--partition {partition} divides the work by hand, and torchrun divides it among its "
            f"{rank.world_size} processes; leave --partition out, or start the command without "
            "torchrun."
        )
    if engine == "ray":
        raise ConfigError(
            "--engine ray divides the work among the workers of a Ray cluster, and torchrun among "
            f"its {rank.world_size} processes; leave --engine out, or start the command once, "
            "without torchrun."
        )


def rank_resources(device: str, num_workers: int | None, rank: Rank) -> tuple[str, int]:
    """Return the device of a rank, and the number of its processes that decode images.

    The device is the rank's own GPU, or the one that was given if that is no GPU. Its number of
    processes is the given one, or its share of the node's CPUs, less one.

    Makes the GPU torch's current one, so that no rank allocates memory on the first GPU.

    Raises:
        ConfigError: all ranks are told to use one GPU, or the node has too few.
    """
    if num_workers is None:
        num_workers = max(num_cpus() // rank.local_world_size - 1, 1)
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return device, num_workers
    if device != "cuda":
        raise ConfigError(
            f"--device is {device}, which all processes of torchrun would share; expected cuda or "
            "auto, which give each process its own GPU."
        )
    num_gpus = torch.cuda.device_count()
    if rank.local_index >= num_gpus:
        raise ConfigError(
            f"torchrun started {rank.local_world_size} processes on this node and torch sees "
            f"{num_gpus} GPUs; expected one GPU for each. Give --nproc-per-node {num_gpus}."
        )
    torch.cuda.set_device(rank.local_index)
    return f"cuda:{rank.local_index}", num_workers


class TorchrunExecutor(LocalExecutor):
    """Runs teachers in all ranks; rank 0 uses it.

    Args:
        ranks: the connection to the others.
    """

    def __init__(self, ranks: RankStore) -> None:
        super().__init__()
        self._ranks = ranks
        self._environment: NodeEnvironment | None = None

    def begin(self, context: BuildContext, specs: Sequence[CacheSpec]) -> None:
        """Refuse a cache that other processes cannot see; set the number of threads."""
        self._environment = driver_environment(context, specs)
        super().begin(context, specs)

    def build(self, context: BuildContext, jobs: Sequence[TeacherJob]) -> list[JobResult]:
        """Build and seal the Zarr shards of all jobs in all ranks."""
        assert self._environment is not None
        ranks = self._ranks
        shares = divide(jobs, ranks.rank.world_size)
        options = replace(
            context.options, num_threads=context.options.num_threads or torch.get_num_threads()
        )
        totals = {_label(job): _num_rows(context, job) for job in jobs if job.shards}
        done = dict.fromkeys(totals, 0)

        def show() -> None:
            for label, total in totals.items():
                context.progress(label, done[label] + ranks.done_by_others(label), total)

        def progress(label: str, own: int, _: int) -> None:
            done[label] = own
            ranks.report(label, own)
            show()

        specs = [job.spec for job in jobs]
        assignment = Assignment(self._environment, specs, options)
        ranks.send([_encode(assignment, share) for share in shares])
        own = [replace(job, shards=shares[0].get(job.spec.name, [])) for job in jobs]
        result = super().build(replace(context, options=options, progress=progress), own)
        while (others := ranks.results()) is None:
            show()
            time.sleep(POLL_S)
        show()
        numbers = zip(_numbers(result), *others, strict=True)
        return [
            JobResult(sum(rows for rows, _ in of_job), max(seconds for _, seconds in of_job))
            for of_job in numbers
        ]


def build_share(ranks: RankStore, options: BuildOptions) -> None:
    """Do the work of a rank other than 0: wait for its share, build and seal it.

    Args:
        ranks: the connection to rank 0.
        options: device and decoding processes of this rank; the others come from rank 0.

    Raises:
        MovekdError: this node differs from that of rank 0; or as ``LocalExecutor``.
    """
    assignment, share = _decode(ranks.receive())
    executor, rank = LocalExecutor(), ranks.rank
    asked = assignment.options
    own = replace(asked, device=options.device, num_workers=options.num_workers)
    try:
        kinds = {torch.device(each.device).type for each in (asked, own)}
        if len(kinds) > 1:
            raise CacheError(
                f"it uses {own.device} and rank 0 uses {asked.device}, and their features differ; "
                "give --device cpu, or leave this node out."
            )
        context = open_context(replace(assignment, options=own), executor)
    except MovekdError as error:
        raise type(error)(f"{rank}: {error}") from None
    context = replace(context, progress=lambda label, done, total: ranks.report(label, done))
    jobs = [
        TeacherJob(
            spec,
            TeacherWriter(context.storage, spec.name, context.catalog.num_rows),
            share.get(spec.name, []),
        )
        for spec in assignment.specs
    ]
    ranks.finish(_numbers(executor.build(context, jobs)))


def divide(jobs: Sequence[TeacherJob], count: int) -> list[Share]:
    """Return the Zarr shards of each of ``count`` ranks.

    The blocks that lack something are dealt out in turn, so that a resumed build keeps all ranks
    busy. All teachers of a block go to one rank, which decodes its images once.
    """
    blocks: dict[int, Share] = {}
    for job in jobs:
        for shard in job.shards:
            block = shard * job.store.layout.rows_per_shard // layout.MAX_SHARD_ROWS
            blocks.setdefault(block, {}).setdefault(job.spec.name, []).append(shard)
    shares: list[Share] = [{} for _ in range(count)]
    for position, block in enumerate(sorted(blocks)):
        for name, shards in blocks[block].items():
            shares[position % count].setdefault(name, []).extend(shards)
    return shares


def _label(job: TeacherJob) -> str:
    return f"{job.spec.name}: build"  # as the loop of teachers reports it


def _num_rows(context: BuildContext, job: TeacherJob) -> int:
    tasks = shard_tasks(context.catalog, job.store, job.shards)
    return sum(len(task.row_ids) for task in tasks)


def _encode(assignment: Assignment, share: Share) -> dict[str, Any]:
    """Return what a rank needs, as JSON can hold it."""
    environment, options = asdict(assignment.environment), asdict(assignment.options)
    marks = {name: content.decode("latin-1") for name, content in environment["marks"].items()}
    return {
        "environment": environment | {"marks": marks},
        "specs": [spec.model_dump(mode="json") for spec in assignment.specs],
        "options": options | {"dtype": str(options["dtype"]).removeprefix("torch.")},
        "share": share,
    }


def _decode(task: dict[str, Any]) -> tuple[Assignment, Share]:
    """Return what ``_encode`` was given."""
    environment, options = task["environment"], task["options"]
    marks = {name: content.encode("latin-1") for name, content in environment["marks"].items()}
    assignment = Assignment(
        NodeEnvironment(**environment | {"marks": marks}),
        [CacheSpec.model_validate(spec) for spec in task["specs"]],
        BuildOptions(**options | {"dtype": getattr(torch, options["dtype"])}),
    )
    return assignment, task["share"]


def _numbers(results: Sequence[JobResult]) -> list[tuple[int, float]]:
    return [(each.num_rows, each.seconds) for each in results]
