"""A short part of `make test-hostile`: kills, damages, mutations, full disks."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRIALS = 8


def test_nothing_is_lost_or_wrong_without_a_word() -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "hostile.py"),
            *("--trials", str(TRIALS), "--seed", "7", "--jobs", "1"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert figures["silent_wrong"] == 0
    campaigns = ("kills", "damages", "mutations", "full_disks")
    assert sum(figures[name] for name in campaigns) >= TRIALS * 3 // 4
