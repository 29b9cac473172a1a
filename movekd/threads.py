"""How many threads this process may use: its CPUs, less what a container's quota takes away.

Input: the affinity of the process and the CPU quota of its control groups. Output: a number, and
``OMP_NUM_THREADS`` where the quota is the smaller one. PyTorch sees the affinity and no quota; its
threads then wait for each other, which takes many times as long as one thread would.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
_MAX_BYTES = 4096


def num_cpus(root: Path = CGROUP_ROOT, of_process: Path = CGROUP_OF_PROCESS) -> int:
    """Return how many CPUs this process may use at once, at least 1.

    Args:
        root: where the control groups are mounted, of version 1 or 2.
        of_process: the file that says which groups hold this process.
    """
    quotas = list(_quotas(root, of_process))
    return max(1, min([_num_allowed(), *map(int, quotas)]))


def limit_threads(root: Path = CGROUP_ROOT, of_process: Path = CGROUP_OF_PROCESS) -> None:
    """Set OMP_NUM_THREADS to the quota, unless the user has set it or no quota is smaller.

    Call it before numpy or torch is imported: they read it once. Child processes inherit it.
    """
    global _is_limited
    number = num_cpus(root, of_process)
    if number < _num_allowed() and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(number)
        _is_limited = True


def environment_of_one_thread() -> dict[str, str]:
    """Return the environment of a child process that trains tiny models: one thread.

    More of them wait for each other longer than they work, and much longer beside other processes.
    A number that the user has set stays.
    """
    environment = dict(os.environ)
    if _is_limited:
        del environment["OMP_NUM_THREADS"]
    return {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | environment


_is_limited = False
"""Whether OMP_NUM_THREADS is the quota's, and not the user's."""


def _num_allowed() -> int:
    """Return the number of CPUs that the scheduler may give to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path, of_process: Path) -> Iterator[float]:
    """Yield the quota in CPUs of every control group that holds this process."""
    for line in _read(of_process).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mounts: list[Path] = []
        if number == "0" and not controllers:  # version 2
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        files = _VERSION_1 if controllers else _VERSION_2
        # A container may see its own group as the root, or under the host's path.
        path = PurePosixPath(group.replace("..", ""))
        folders = {"", *(str(each).strip("/") for each in (path, *path.parents))}
        for mount in mounts:
            for folder in folders:
                words = [word for name in files for word in _read(mount / folder / name).split()]
                if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
                    yield int(words[0]) / int(words[1])


_VERSION_2 = ("cpu.max",)
_VERSION_1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def _read(path: Path) -> str:
    """Return the text of a small file; empty if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_BYTES)
    except OSError:
        return ""
