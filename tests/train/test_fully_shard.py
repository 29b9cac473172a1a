"""Two processes that shard the student by FSDP2 train as one process does; on a CPU with gloo.

accelerate shards only on accelerators, so the steps are taken by hand (``sharded_steps``). Rows are
packed, the parts learn at different rates, and of the language model an adapter learns, or all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from movekd.student.language_lora import LORA_DIR, is_adapter
from movekd.train.checkpoints import CHECKPOINT_FILE
from movekd.train.parameter_groups import HEADS, group_part
from sharded_steps import WEIGHTS_FILE, Steps
from small_language_model import write_language_model
from torchrun import both_processes

RATES = {"mole": 0.1, "projector": 0.02, "vision_tower": 0.01, "language_model": 0.2, HEADS: 0.05}
SGD = ("training.optim=sgd", "training.optim_args=momentum=0.9")
KEYS = (
    "student.mole.balance_weight=0",  # the balance loss is one of a micro-batch
    "distill.summary_weight=0.5",
    "data.packing=true",
    f"training.learning_rate={RATES['language_model']}",
    "training.max_grad_norm=1",  # less than every step's
    "training.weight_decay=0",
)
LORA = (
    "student.language_model_lora={r: 4, lora_alpha: 8, lora_dropout: 0}",
    "trained=[mole, projector, language_model]",
    f"learning_rates={{mole: 0.1, projector: 0.02, {HEADS}: 0.05}}",
)
ALL = (f"learning_rates={{mole: 0.1, projector: 0.02, vision_tower: 0.01, {HEADS}: 0.05}}",)
NUM_FIRST, NUM_STEPS = 1, 3
ADAMW = ("training.learning_rate=2e-3", "learning_rates={mole: 1e-3, projector: 1e-3}")
CASES = {
    "adapter": (170, (*LORA, *SGD)),
    "all": (170, (*ALL, *SGD)),
    "per_teacher": (170, (*LORA, *SGD, "student.mole.experts=per_teacher")),
    "adamw": (170, (*LORA, *ADAMW)),
    "qwen3": (170, (*LORA, *SGD)),
    "gemma3": (150, (*LORA, *SGD)),
}
"""Name -> tokens of a row, and keys. Of each a step has a row without an image beside one with."""
cases = pytest.mark.parametrize(
    "name", ["adapter", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "adapter")]
)


@dataclass(frozen=True)
class Runs:
    """``one`` and ``two``: the weights that one process and two had after ``NUM_STEPS`` steps."""

    config: Any
    folder: Any
    one: dict[str, Any]
    two: dict[str, Any]


@pytest.fixture(scope="module")
def train(digits, tmp_path_factory):
    """Return a function that takes the steps of a case; each case runs once."""
    done: dict[str, Runs] = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            length, changed = CASES[name]
            keys = [*KEYS, *changed, f"data.model_max_length={length}"]
            if name in ("qwen3", "gemma3"):
                model = write_language_model(name, folder / "language_model")
                keys.append(f"student.language_model={model}")
            config = digits.config("finetune", *keys, "training.per_device_train_batch_size=2")
            half = digits.config("finetune", *keys, "training.per_device_train_batch_size=1")
            (folder / "half.yaml").write_text(half.to_yaml())
            words = (folder / "half.yaml", digits.cache, folder / "two", NUM_FIRST, NUM_STEPS)
            ended = both_processes(*words, module="sharded_steps")
            assert [process.returncode for process in ended] == [0, 0], [p.stderr for p in ended]
            steps = Steps(config, digits.cache, folder / "one", is_sharded=False)
            order = list(steps.trainer._get_train_sampler())[: 2 * NUM_STEPS]
            pairs = [
                [bool(steps.rows[row].images) for row in order[at : at + 2]] for at in (0, 2, 4)
            ]
            assert [True, False] in pairs
            assert steps.rows.samples_per_row > 1
            steps.take(0, NUM_STEPS)
            steps.write(folder / "one" / "second")
            weights = (
                torch.load(folder / who / "second" / WEIGHTS_FILE, weights_only=True)
                for who in ("one", "two")
            )
            done[name] = Runs(config, folder, *weights)
        return done[name]

    return run


def assert_same(name, found, expected, before):
    """Compare weights: each number, and the way that each part has gone, to a share of it.

    AdamW divides a gradient by its size, so that rounding moves small ones by a share of the rate.
    """
    most, share = 2e-5 if name == "adamw" else 1e-6, 5e-5
    assert found.keys() == expected.keys()
    errors: dict[str, list[float]] = {}
    for parameter, weight in expected.items():
        torch.testing.assert_close(found[parameter], weight, rtol=0, atol=most, msg=parameter)
        error, way = errors.setdefault(group_part(parameter), [0.0, 0.0])
        error += (found[parameter] - weight).square().sum().item()
        way += (weight - before[parameter]).square().sum().item()
        errors[group_part(parameter)] = [error, way]
    for part, (error, way) in errors.items():
        assert error <= share**2 * way, part


@cases
def test_two_sharded_processes_take_the_steps_of_one(train, name):
    runs = train(name)
    assert runs.two["norms"] == pytest.approx(runs.one["norms"], rel=1e-5)
    assert min(runs.one["norms"]) > 1
    assert all(torch.equal(runs.two["before"][n], p) for n, p in runs.one["before"].items())
    assert_same(name, runs.two["now"], runs.one["now"], runs.one["before"])


@pytest.mark.parametrize("name", ["adapter", pytest.param("all", marks=pytest.mark.slow)])
def test_each_part_of_a_sharded_model_moves_at_its_rate_or_not_at_all(train, name):
    """One step of SGD moves a weight by rate times gradient; its momentum starts at 0."""
    runs = train(name)
    found, parts = runs.two, set()
    for parameter, before in found["before"].items():
        if parameter not in found["gradients"]:
            assert torch.equal(found["now"][parameter], before), parameter
            continue
        part = group_part(parameter)
        moved = RATES[part] * found["gradients"][parameter]
        torch.testing.assert_close(found["after"][parameter], before - moved, msg=parameter)
        if moved.abs().max() > 1e-6:
            parts.add(part)
    trained = set(runs.config.trained)
    assert parts == {*trained, HEADS}
    learns = {group_part(n) for n in found["gradients"]}
    assert learns == parts
    if name == "adapter":
        kept = found["before"].keys() - found["gradients"].keys()
        assert {group_part(n) for n in kept} == {"vision_tower", "language_model"}
        assert not any(is_adapter(n) for n in kept)


@cases
def test_a_whole_model_continues_from_a_checkpoint_of_a_sharded_one(digits, tmp_path, train, name):
    runs = train(name)
    steps = Steps(runs.config, digits.cache, tmp_path / "run", is_sharded=False)
    steps.load(runs.folder / "two" / "first")
    steps.take(NUM_FIRST, NUM_STEPS)
    steps.write(tmp_path / "end")
    found = torch.load(tmp_path / "end" / WEIGHTS_FILE, weights_only=True)["now"]
    assert_same(name, found, runs.two["now"], runs.two["before"])


@cases
def test_the_files_of_a_sharded_model_hold_its_weights(train, name):
    """Both what a checkpoint holds, and what evaluation, ask and export load."""
    runs = train(name)
    files, whole = (
        {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
        for folder in (runs.folder / who / "second" for who in ("two", "one"))
    )
    learned, _ = files.pop(Path(CHECKPOINT_FILE)), whole.pop(Path(CHECKPOINT_FILE))
    assert learned.keys() >= runs.two["gradients"].keys()
    assert all(torch.equal(tensor, runs.two["now"][n]) for n, tensor in learned.items())
    assert any(LORA_DIR in path.parts for path in files) == (name != "all")
    assert whole.keys() == files.keys()
    values = {tensor.numpy().tobytes() for tensor in runs.two["now"].values()}
    for path, tensors in files.items():
        assert {n: t.shape for n, t in tensors.items()} == {
            n: t.shape for n, t in whole[path].items()
        }
        assert all(tensor.numpy().tobytes() in values for tensor in tensors.values()), path
