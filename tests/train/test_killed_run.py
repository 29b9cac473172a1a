"""Runs that are killed at a file, or find no room for it, and are resumed: as undisturbed ones."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from movekd.errors import MovekdError, TrainingError
from movekd.files.ownership import changes, read_owned
from movekd.train.checkpoints import PARTIAL_DIR, find_whole, numbered_checkpoints
from movekd.train.run_record import require_deletable

KEYS = (
    "training.max_steps=2",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.save_total_limit=1",
    "training.lr_scheduler_type=constant",  # so that a step too many would change the weights
    "student.mole.lora_dropout=0.3",
)
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """A run's folder, and the weights of its model."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    digits.train(folder, "pretrain", *KEYS)
    return folder, digits.weights(folder)


def in_child(action):
    """Run an action in a forked child; return how it ended, as ``waitpid`` does."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(is_due, output, action):
    """Run an action in a child that kills itself when ``is_due(number, name, path)`` of a file.

    The files are those in ``output`` as they are opened, renamed, made and removed. Returns
    whether it was killed.
    """

    def watched():
        seen = 0

        def audit(name, arguments):
            nonlocal seen
            if name in EVENTS and str(output) in str(arguments[0]):
                seen += 1
                if is_due(seen, name, " ".join(map(str, arguments))):
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        action()

    status = in_child(watched)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def assert_resumed(digits, output, expected, **flags):
    """Check what a killed run left, resume it, and compare it with the undisturbed one."""
    whole, damaged = find_whole(output)
    assert not damaged
    assert whole in (None, *(path for _, path in numbered_checkpoints(output)))
    require_deletable(output, force=False)
    digits.train(output, "pretrain", *KEYS, resume=True, **flags)
    folder, weights = expected
    found = digits.weights(output)
    assert found.keys() == weights.keys()
    assert not [name for name in found if not torch.equal(found[name], weights[name])]
    names = [{p.relative_to(f) for f in [at] for p in f.rglob("*")} for at in (output, folder)]
    assert names[0] == names[1]
    assert not changes(output, read_owned(output))


@pytest.mark.parametrize(
    "due",
    [
        ("os.rename", "checkpoint-2"),
        ("os.rename", "model/mm_projector.safetensors"),
    ],
)
def test_killed_at_a_file_and_resumed_equals_undisturbed(digits, undisturbed, tmp_path, due):
    output = tmp_path / "run"

    def is_due(number, name, path):
        return name == due[0] and due[1] in path and ".tmp" not in path

    assert killed_at(is_due, output, lambda: digits.train(output, "pretrain", *KEYS))
    assert_resumed(digits, output, undisturbed)


def test_killed_as_it_writes_its_first_record_and_overwritten(digits, tmp_path):
    output = tmp_path / "run"

    def is_due(number, name, path):
        return name == "os.rename" and ".movekd-files.json" in path

    assert killed_at(is_due, output, lambda: digits.train(output, "pretrain", *KEYS))
    assert [path.suffix for path in output.iterdir() if path.name != ".movekd-train.lock"] == [
        ".tmp"
    ]
    require_deletable(output, force=False)


@pytest.mark.slow
def test_killed_at_any_file_and_resumed_equals_undisturbed(digits, undisturbed, tmp_path):
    output, event, killed = tmp_path / "run", 0, True
    while killed:
        event += 1
        shutil.rmtree(output, ignore_errors=True)
        killed = killed_at(
            lambda number, name, path, at=event: number == at,
            output,
            lambda: digits.train(output, "pretrain", *KEYS),
        )
        if killed:
            assert_resumed(digits, output, undisturbed)
    assert event > 90


@pytest.mark.slow
def test_killed_as_it_replaces_a_run_and_repeated_equals_undisturbed(digits, undisturbed, tmp_path):
    output, event, killed = tmp_path / "run", -4, True
    while killed:
        event += 5
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(undisturbed[0], output)
        (output / "notes.txt").write_text("mine")

        def replace():
            digits.train(output, "pretrain", *KEYS, overwrite=True)

        killed = killed_at(lambda number, name, path, at=event: number == at, output, replace)
        if killed:
            assert (output / "notes.txt").read_text() == "mine"
            replace()
            (output / "notes.txt").unlink()
            assert_resumed(digits, output, undisturbed)
    assert event > 100


def test_a_file_that_finds_no_room_is_a_sentence_and_loses_no_checkpoint(
    digits, undisturbed, tmp_path
):
    output = tmp_path / "run"

    def progress(what, done, total):
        if done == 2:  # the first checkpoint is saved
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))

    def action():
        words = r"checkpoint-2 cannot be written .*expected room.* checkpoint-1 stays; --resume"
        with pytest.raises(TrainingError, match=words) as caught:
            digits.train(output, "pretrain", *KEYS, progress=progress)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2000

    assert in_child(action) == 0
    assert [path.name for _, path in numbered_checkpoints(output)] == ["checkpoint-1"]
    assert not (output / PARTIAL_DIR).exists()
    assert_resumed(digits, output, undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_a_full_disk_at_any_size_is_a_sentence_and_loses_no_checkpoint(
    digits, undisturbed, tmp_path
):
    output, disk = tmp_path / "disk/run", tmp_path / "disk"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in undisturbed[0].rglob("*") if path.is_file())

    def action():
        try:
            digits.train(output, "pretrain", *KEYS, "training.report_to=tensorboard")
        except (MovekdError, OSError):  # the command prints a sentence for both
            os._exit(2)

    codes = set()
    for share in range(1, 26):
        size = f"size={needed * share // 10}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", disk], check=True)
        try:
            codes.add(code := os.waitstatus_to_exitcode(in_child(action)))
            assert code in (0, 2), share
            assert not find_whole(output).damaged
            if code == 2:
                subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                digits.train(output, "pretrain", *KEYS, resume=True)
            weights = digits.weights(output)
            assert weights.keys() == undisturbed[1].keys()
            assert not [n for n in weights if not torch.equal(weights[n], undisturbed[1][n])]
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    assert codes == {0, 2}
