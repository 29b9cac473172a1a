"""Tests of movekd.train.checkpoints: a resume continues from what is whole, or refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from movekd.errors import TrainingError
from movekd.files.ownership import OWNERSHIP_FILE, read_owned, write_owned
from movekd.train.checkpoints import find_whole, last_checkpoint, numbered_checkpoints, rotate

KEYS = (
    "training.max_steps=3",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.save_total_limit=null",
    "student.mole.lora_dropout=0.3",  # so that the state of the random numbers matters
)
IMPORTANT = ("optimizer.pt", "trained.safetensors", "rng_state.pth")


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


DAMAGES = (delete, empty, halve, flip)


class Run:
    """A run that was stopped in its third step, and the weights that it would have ended with."""

    def __init__(self, digits, folder):
        self.digits, self.folder = digits, folder / "stopped"
        digits.train(folder / "whole", "pretrain", *KEYS)
        self.expected = digits.weights(folder / "whole")

        def stop(what, done, total):
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            digits.train(self.folder, "pretrain", *KEYS, progress=stop)

    def resume(self, output, **kwargs):
        """Resume the run in a folder; return the lines that the user sees."""
        lines = []
        self.digits.train(output, "pretrain", *KEYS, resume=True, notify=lines.append, **kwargs)
        found = self.digits.weights(output)
        assert found.keys() == self.expected.keys()
        assert not [n for n in found if not torch.equal(found[n], self.expected[n])]
        return lines

    def names(self):
        """Return the names of the files of a checkpoint."""
        return sorted(path.name for path in (self.folder / "checkpoint-2").iterdir())


@pytest.fixture(scope="module")
def stopped(digits, tmp_path_factory):
    return Run(digits, tmp_path_factory.mktemp("stopped"))


def copied(run, tmp_path, *damages):
    """Return a copy of the stopped run, in which files of its last checkpoint are damaged."""
    shutil.copytree(run.folder, tmp_path / "run")
    for name, damage in damages:
        damage(tmp_path / "run/checkpoint-2" / name)
    return tmp_path / "run"


def test_a_checkpoint_records_all_of_its_files(stopped):
    for _, path in numbered_checkpoints(stopped.folder):
        owned = read_owned(path)
        assert set(owned.files) == {p.name for p in path.iterdir()} - {OWNERSHIP_FILE}
    assert [step for step, _ in numbered_checkpoints(stopped.folder)] == [2, 1]
    assert find_whole(stopped.folder) == (stopped.folder / "checkpoint-2", {})


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file_is_named(stopped, tmp_path, damage):
    for name in stopped.names():
        run = copied(stopped, tmp_path / name, (name, damage))
        whole, damaged = find_whole(run)
        if damage is delete and name == OWNERSHIP_FILE:  # as an older version left it
            assert (whole, damaged) == (run / "checkpoint-2", {})
            continue
        assert whole == run / "checkpoint-1"
        assert list(damaged) == [run / "checkpoint-2"]
        assert name in damaged[run / "checkpoint-2"]


def test_a_damaged_checkpoint_makes_way_for_the_one_before(stopped, tmp_path):
    run = copied(stopped, tmp_path, ("optimizer.pt", flip))
    damaged = (run / "checkpoint-2/optimizer.pt").read_bytes()
    lines = stopped.resume(run)
    assert lines[0] == (
        "checkpoint-2 is damaged (optimizer.pt of other content); resuming from checkpoint-1."
    )
    assert lines[1].startswith("checkpoint-2 is now checkpoint-2.damaged;")
    assert (run / "checkpoint-2.damaged/optimizer.pt").read_bytes() == damaged
    assert find_whole(run) == (run / "checkpoint-3", {})


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_resume_from_damage_ends_with_the_reference_weights(stopped, tmp_path, damage):
    for name in stopped.names():
        run = copied(stopped, tmp_path / name, (name, damage))
        (line, *_) = stopped.resume(run)
        assert name in line or "no checksums" in line


def test_without_a_whole_checkpoint_a_resume_is_refused_and_loses_nothing(
    stopped, tmp_path, snapshot
):
    run = copied(stopped, tmp_path, ("optimizer.pt", delete))
    shutil.rmtree(run / "checkpoint-1")
    before = snapshot(run)
    words = (
        r"holds no whole checkpoint.*checkpoint-2 is damaged \(optimizer\.pt missing\)\. Restore"
    )
    with pytest.raises(TrainingError, match=words):
        stopped.resume(run)
    assert snapshot(run) == before


def without_record(run):
    for _, path in numbered_checkpoints(run):
        (path / OWNERSHIP_FILE).unlink(missing_ok=True)
    return run


def test_a_checkpoint_of_an_older_version_is_resumed_with_a_line(stopped, tmp_path):
    (line,) = stopped.resume(without_record(copied(stopped, tmp_path)))
    assert re.match(r"checkpoint-2 has no checksums \(an older version", line)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", IMPORTANT)
def test_without_a_record_the_checksums_inside_the_files_count(stopped, tmp_path, name, damage):
    run = without_record(copied(stopped, tmp_path, (name, damage)))
    if damage is flip and name == "trained.safetensors":  # it has no checksum inside
        assert find_whole(run).whole == run / "checkpoint-2"
        return
    assert find_whole(run).whole == run / "checkpoint-1"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_step", 10**9),
        ("global_step", "2"),
        ("global_step", None),
        ("max_steps", 0),
        ("epoch", float("nan")),
        ("log_history", 3),
        ("stateful_callbacks", [1]),
        ("unknown_key", 1),
    ],
)
def test_without_a_record_an_odd_state_is_damage(stopped, tmp_path, key, value):
    run = without_record(copied(stopped, tmp_path))
    path = run / "checkpoint-2/trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    whole, damaged = find_whole(run)
    assert whole == run / "checkpoint-1"
    assert damaged[run / "checkpoint-2"].startswith("trainer_state.json ")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_saved_without_a_state_is_not_resumed_from(stopped, tmp_path, name):
    """As `save_only_model` does: its record is right, and the weights would be others."""
    path = copied(stopped, tmp_path, (name, delete)) / "checkpoint-2"
    write_owned(path, read_owned(path).files.keys() - {name}, "movekd train")
    assert re.match(r"the state of the .* is missing", find_whole(tmp_path / "run").damaged[path])


def test_the_log_is_that_of_the_newest_checkpoint_with_weights(stopped, tmp_path):
    run = copied(stopped, tmp_path, ("optimizer.pt", flip))
    assert last_checkpoint(run) == run / "checkpoint-2"
    (run / "checkpoint-2/trained.safetensors").unlink()
    assert last_checkpoint(run) == run / "checkpoint-1"


def test_rotation_keeps_the_newest_whole_ones_and_what_is_not_ours(stopped, tmp_path):
    run = copied(stopped, tmp_path)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-4")
    halve(run / "checkpoint-4/optimizer.pt")
    (run / "checkpoint-1/notes.txt").write_text("mine")
    rotate(run, 2)
    assert [step for step, _ in numbered_checkpoints(run)] == [4, 3, 2, 1]
    assert [path.name for path in (run / "checkpoint-1").iterdir()] == ["notes.txt"]
    rotate(run, 1)
    assert [step for step, _ in numbered_checkpoints(run)] == [4, 3, 1]
    without_record(run)
    for limit in (1, 0, None):
        rotate(run, limit)
        assert [step for step, _ in numbered_checkpoints(run)] == [4, 3, 1]


def test_weights_that_are_not_finite_are_never_saved(stopped, tmp_path):
    """A step so large that the weights overflow, after a loss that was still finite."""
    digits = stopped.digits
    keys = ("training.max_steps=1", "training.warmup_steps=0")
    for number, saving in enumerate(("no", "steps")):
        run = tmp_path / str(number)
        words = (
            r"weights of .*(mole|projector).* not finite after step 1 .*were not saved.*No check"
        )
        saves = f"training.save_strategy={saving}"
        with pytest.raises(TrainingError, match=words):
            digits.train(run, "pretrain", *keys, saves, learning_rate=1e38)
        assert not list(run.rglob("*.safetensors"))
        assert not numbered_checkpoints(run)


def test_a_checkpoint_whose_optimizer_deepspeed_has_saved_is_whole(stopped, tmp_path):
    """DeepSpeed writes one file per rank, into a folder of its own; test_deepspeed resumes one."""
    path = copied(stopped, tmp_path) / "checkpoint-2"
    names = read_owned(path).files.keys() - {"optimizer.pt"}
    moved = path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    moved.parent.mkdir()
    (path / "optimizer.pt").rename(moved)
    write_owned(path, {*names, moved.relative_to(path).as_posix()}, "movekd train")
    assert find_whole(tmp_path / "run") == (path, {})
    flip(moved)
    assert "of other content" in find_whole(tmp_path / "run").damaged[path]
