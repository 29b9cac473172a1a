"""Two processes under torchrun train as one does: same losses, same weights."""

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_two_ranks_equal_one(digits, tmp_path, stage):
    # finetune has text-only samples, so some ranks see batches without any image
    single = digits.train(tmp_path / "one", stage, "training.max_steps=3")
    config = digits.config(stage, "training.max_steps=3", "training.per_device_train_batch_size=2")
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "-m", "movekd", "train", "--config", tmp_path / "run.yaml"]
    done = subprocess.run(
        [*torchrun, "--cache", digits.cache, "--output", tmp_path / "two"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    logged = json.loads((tmp_path / "two" / "log.json").read_text(encoding="utf-8"))
    for one, two in zip(digits.logged(single), logged, strict=False):
        for name in ("loss_text", "loss_kd"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)
    one, two = digits.weights(tmp_path / "one"), digits.weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-4, msg=name)
