"""The demo end to end, as `movekd demo` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_answers_questions_about_unseen_scans(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "movekd", "demo", "--output", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "One seed illustrates and does not prove" in done.stderr
    assert len(list((tmp_path / "demo/sheets").glob("*.png"))) == 2
    assert (tmp_path / "demo/runs/with_teachers/finetune/report.html").is_file()
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == figures
    majority = 0.236  # what the commonest answer of each question type would score
    for arm in figures["arms"].values():
        assert arm["accuracy"]["all"]["accuracy"] > majority + 0.05
    with_teachers = figures["arms"]["with teachers"]
    first, last = with_teachers["pretrain"][0], with_teachers["pretrain"][-1]
    assert last["loss_kd"] < 0.7 * first["loss_kd"]
    assert last["token_std"] > 0.7 * first["token_std"]
