"""Threads follow the affinity and the quota of a container, unless the user says otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from movekd.threads import environment_of_one_thread, limit_threads, num_cpus

ALLOWED = len(os.sched_getaffinity(0))
LOOK = """
import json, os, sys
os.sched_setaffinity(0, set(json.loads(sys.argv[1])) or os.sched_getaffinity(0))
from pathlib import Path
from movekd.threads import limit_threads
limit_threads(Path(sys.argv[2]), Path(sys.argv[3]))
import torch
from movekd.corpus.pack import DEFAULT_WORKERS
print(json.dumps([torch.get_num_threads(), DEFAULT_WORKERS, os.environ.get("OMP_NUM_THREADS")]))
"""


@pytest.fixture
def eight(monkeypatch):
    """The scheduler allows eight CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


V1 = "5:cpu,cpuacct:/pod/x\n1:name=systemd:/pod/x\n"
CASES = [
    ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # half a CPU is one thread
    ("0::/\n", {"cpu.max": "9999999 100000\n"}, 8),
    ("0::/pod/x\n", {"pod/cpu.max": "300000 100000", "pod/x/cpu.max": "max 100000"}, 3),
    ("0::/pod/x\n", {"pod/cpu.max": "600000 100000", "pod/x/cpu.max": "400000 100000"}, 4),
    ("0::/elsewhere\n", {"cpu.max": "200000 100000"}, 2),  # a container sees its own as the root
    (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    (V1, {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    (
        V1,
        {
            "cpu,cpuacct/pod/x/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/pod/x/cpu.cfs_period_us": "100000",
        },
        2,
    ),
    ("", {}, 8),
    ("0::/\n", {"cpu.max": ""}, 8),
    ("0::/\n", {"cpu.max": "a b"}, 8),
    ("0::/\n", {"cpu.max": "100000 0"}, 8),
    ("nonsense", {"cpu.max": "100000 100000"}, 8),
    ("0::/../../etc\n", {"cpu.max": "100000 100000"}, 1),
]


@pytest.mark.parametrize(("lines", "files", "expected"), CASES)
@pytest.mark.usefixtures("eight")
def test_the_smallest_quota_counts(tmp_path, lines, files, expected):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "self").write_text(lines)
    assert num_cpus(tmp_path / "cgroup", tmp_path / "self") == expected


@pytest.mark.usefixtures("eight")
def test_the_users_own_number_stays(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("200000 100000")
    (tmp_path / "self").write_text("0::/")
    monkeypatch.setattr("movekd.threads._is_limited", False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads(tmp_path, tmp_path / "self")
    assert os.environ["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads(tmp_path, tmp_path / "gone")
    assert "OMP_NUM_THREADS" not in os.environ
    limit_threads(tmp_path, tmp_path / "self")
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert environment_of_one_thread()["OMP_NUM_THREADS"] == "1"  # the quota is not the user's
    monkeypatch.setattr("movekd.threads._is_limited", False)
    assert environment_of_one_thread()["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment_of_one_thread()["OMP_NUM_THREADS"] == "1"


def look(cpus: list[int], root: Path, of_process: Path) -> list[object]:
    """Return torch's threads, the threads that decode, and OMP_NUM_THREADS of a child process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(cpus), str(root), str(of_process)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return list(json.loads(done.stdout))


def test_a_process_on_one_cpu_has_one_thread_and_one_worker(tmp_path):
    cpu = min(os.sched_getaffinity(0))
    assert look([cpu], tmp_path, tmp_path / "none") == [1, 1, None]


@pytest.mark.slow
@pytest.mark.skipif(ALLOWED < 2, reason="needs two CPUs")
def test_a_quota_of_one_cpu_gives_one_thread(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000")
    (tmp_path / "self").write_text("0::/")
    assert look([], tmp_path, tmp_path / "self")[::2] == [1, "1"]


@pytest.mark.skipif(ALLOWED < 2, reason="needs two CPUs")
def test_a_real_quota_is_found():
    """Where root may make a control group of its own."""
    folder = Path("/sys/fs/cgroup/cpu") if Path("/sys/fs/cgroup/cpu").is_dir() else None
    if folder is None or not os.access(folder, os.W_OK):
        pytest.skip("no control group of version 1 can be made here")
    group = folder / f"movekd-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        code = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "from movekd.threads import num_cpus; print(num_cpus())"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert found.stdout == "1\n"
    finally:
        group.rmdir()
