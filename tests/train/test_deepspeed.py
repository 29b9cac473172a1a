"""DeepSpeed's ZeRO-2 in two processes on a CPU with gloo trains as plain data parallelism does.

These tests run only where deepspeed is installed; it is not among the packages of `make install`.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from movekd.resources import resource_dir
from torchrun import logged, torchrun, training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

ZERO2 = resource_dir("pipelines") / "accelerate" / "deepspeed_zero2.json"
KEYS = (
    "training.max_steps=4",
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=2",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.optim=sgd",
    "training.optim_args=momentum=0.9",
    "training.learning_rate=0.1",
    "student.mole.balance_weight=0",  # the balance loss is one of a micro-batch
)
ADAPTER = (
    "student.language_model_lora={r: 4, lora_alpha: 8, lora_dropout: 0}",
    "trained=[mole, projector, language_model]",
    "learning_rates={mole: 0.05, projector: 0.02, heads: 0.05}",
    "data.packing=true",
    "data.model_max_length=170",
)
CPU = {"DS_ACCELERATOR": "cpu"}


def run(config, output: Path, cache: Path, *words):
    return torchrun(*training(config, output, cache), *words, env=os.environ | CPU)


@pytest.mark.parametrize("keys", [(), ADAPTER], ids=["all", "adapter"])
def test_zero_2_trains_and_resumes_as_plain_data_parallelism(digits, tmp_path, keys):
    for name, more in (("plain", ()), ("zero2", (f"training.deepspeed={ZERO2}",))):
        config = digits.config("finetune", *KEYS, *keys, *more)
        done = run(config, tmp_path / name, digits.cache)
        assert done.returncode == 0, done.stderr
    states = list((tmp_path / "zero2" / "checkpoint-2").glob("global_step2/*optim_states.pt"))
    assert len(states) == 2  # the optimizer is divided: no quiet DDP
    for one, two in zip(logged(tmp_path / "plain"), logged(tmp_path / "zero2"), strict=True):
        for figure in {"loss_text", "loss_kd", "grad_norm"} & one.keys():
            assert two[figure] == pytest.approx(one[figure], rel=1e-5), figure
    plain, zero2 = (digits.weights(tmp_path / name) for name in ("plain", "zero2"))
    assert plain.keys() == zero2.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(zero2[name], weight, rtol=0, atol=1e-6, msg=name)
    (tmp_path / "zero2" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    done = run(config, tmp_path / "zero2", digits.cache, "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "zero2" / "checkpoint-4").is_dir()
    resumed = digits.weights(tmp_path / "zero2")
    assert all(torch.equal(resumed[name], weight) for name, weight in zero2.items())


def test_zero_3_is_refused_before_anything_is_written(digits, tmp_path):
    stages = json.loads(ZERO2.read_text())
    stages["zero_optimization"]["stage"] = 3
    (tmp_path / "zero3.json").write_text(json.dumps(stages))
    config = digits.config("finetune", *KEYS, f"training.deepspeed={tmp_path / 'zero3.json'}")
    done = run(config, tmp_path / "run", digits.cache)
    assert "sets ZeRO stage 3, which cuts parameters" in done.stderr
    assert not (tmp_path / "run").exists()
