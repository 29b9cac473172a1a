"""Nodes that come and go: two torchruns on one machine, each a node of one process."""

import subprocess
import time

import pytest
import torch
from torch.distributed import TCPStore

from torchrun import TORCHRUN, environment, logged, training
from watched import read_notes

KEYS = (  # as in test_torchrun: what float32 loses is far below 1e-5
    "student.mole.balance_weight=0",
    "training.optim=sgd",
    "training.learning_rate=0.1",
)
STEPS = ("training.save_strategy=steps", "training.save_steps=1")


def start_node(store, words, notes, log, **env):
    """Start a node that meets the others at a store."""
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}"]
    settings = "is_host=0,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    command = [*TORCHRUN, *options, "--rdzv-conf", settings, "-m", "watched", *map(str, words)]
    env |= {"WATCH_NOTES": str(notes)}
    with log.open("w") as file:
        return subprocess.Popen(command, stderr=file, stdout=file, env=environment(**env))


@pytest.mark.slow
def test_nodes_may_come_and_go(digits, tmp_path):
    """One node; in step 2 another one joins; in step 3 it dies; the first ends alone.

    A node that joins counts no restart, and --overwrite is among the words each time.
    """
    whole = digits.train(tmp_path / "whole", "finetune", *KEYS)
    digits.train(tmp_path / "run", "pretrain", "training.max_steps=1")  # is overwritten once
    words = training(digits.config("finetune", *KEYS, *STEPS), tmp_path / "run", digits.cache)
    notes = tmp_path / "notes"
    notes.mkdir()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nodes = []
    try:
        node = (store, [*words, "--overwrite"], notes)
        nodes.append(start_node(*node, tmp_path / "first.log", WATCH_HOLD="2"))
        while not any("held" in line for line in read_notes(notes)):
            assert nodes[0].poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.1)
        nodes.append(start_node(*node, tmp_path / "second.log", WATCH_DIE="*:3:node"))
        assert nodes[0].wait() == 0, (tmp_path / "first.log").read_text()
    finally:
        for process in nodes:
            process.kill()
            process.wait()
    worlds = {}
    for line in read_notes(notes):
        if "step" in line:
            worlds.setdefault(line["step"], set()).add(line["world"])
    assert (worlds[1], worlds[2], worlds[4]) == ({1}, {2}, {1})
    assert "Traceback" not in (tmp_path / "first.log").read_text()
    for one, other in zip(digits.logged(whole), logged(tmp_path / "run"), strict=True):
        for name in ("loss_text", "loss_kd", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    expected, found = digits.weights(tmp_path / "whole"), digits.weights(tmp_path / "run")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)
