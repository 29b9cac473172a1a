"""A build by several processes of torchrun, which must leave the bytes of one process."""

import itertools
import json
import socket
import subprocess

import pytest
import yaml

from torchrun import TORCHRUN, environment, torchrun
from torchrun_build import read_notes

SHARED_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
"""Torchrun's default: restarted processes get the store of the dead ones."""
ALL = [f"{teacher} {shard}" for teacher in ("clip", "conv") for shard in range(3)]


@pytest.fixture
def command(tmp_path, corpus_dir, tiny_specs):
    """A function: teachers -> the command that builds them into ``tmp_path/cache``."""
    words = ["cache", "build", "--shards", corpus_dir, "--cache", tmp_path / "cache"]
    words += ["--batch-size", "5", "--num-workers", "0", "--device", "cpu", "--json"]
    for spec in tiny_specs:
        content = yaml.safe_dump(spec.model_dump(mode="json"))
        (tmp_path / f"{spec.name}.yaml").write_text(content)

    def given(*teachers):
        files = (("--teacher", tmp_path / f"{teacher}.yaml") for teacher in teachers)
        return [*words, *itertools.chain.from_iterable(files)]

    return given


@pytest.fixture
def start(command, tmp_path):
    """A function that runs it in two processes; returns the result and who wrote what."""
    number = itertools.count()

    def run(stop="", options=(), teachers=("clip", "conv")):
        notes = tmp_path / f"notes{next(number)}"
        notes.mkdir()
        env = {"BUILD_NOTES": str(notes), "BUILD_STOP": stop} | SHARED_STORE
        done = torchrun(*command(*teachers), module="torchrun_build", options=options, env=env)
        return done, read_notes(notes)

    return run


def sentences(done):
    return [line for line in done.stderr.splitlines() if line.startswith("movekd: ")]


def test_two_processes_leave_the_bytes_of_one_and_print_once(
    start, undisturbed, tmp_path, snapshot
) -> None:
    """One teacher, because imports take most of the time; two in the other tests."""
    done, notes = start(teachers=["conv"])
    assert done.returncode == 0, done.stderr
    of_conv = {name: undisturbed[name] for name in undisturbed if not name.startswith("clip.")}
    assert snapshot(tmp_path / "cache") == of_conv
    assert {name: sorted(lines) for name, lines in notes.items()} == {
        "0-0": ["conv 0", "conv 2"],
        "0-1": ["conv 1"],
    }
    (summary,) = json.loads(done.stdout)
    assert summary["images_built"] == 24
    assert summary["seconds"] > 0
    assert done.stderr.count("conv: build: 24/24") <= 1  # plain lines: only what takes seconds
    assert sentences(done) == []


@pytest.mark.slow
def test_after_a_restart_by_torchrun_no_zarr_shard_is_built_twice(
    start, undisturbed, tmp_path, snapshot
) -> None:
    done, notes = start(stop="1:2:SIGKILL", options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "cache") == undisturbed
    assert sorted(line for lines in notes.values() for line in lines) == ALL
    assert "1-0" in notes or "1-1" in notes
    assert json.loads(done.stdout)


@pytest.mark.slow
def test_a_killed_rank_ends_the_command_and_the_next_one_resumes(
    start, undisturbed, tmp_path, snapshot
) -> None:
    done, first = start(stop="0:2:SIGKILL")
    assert done.returncode == 1
    assert done.stdout == ""
    assert sentences(done) == []  # a killed process says nothing, torchrun says who was killed
    assert "Signal 9 (SIGKILL)" in done.stderr
    done, second = start()
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "cache") == undisturbed
    lines = [line for notes in (first, second) for lines in notes.values() for line in lines]
    assert sorted(lines) == ALL


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_and_is_said_once(start, undisturbed, tmp_path, snapshot) -> None:
    """Torchrun gets the signal, as from a terminal; the ranks are in sessions of their own."""
    done, _ = start(stop="1:1:agent")
    assert done.returncode != 0
    (sentence,) = sentences(done)
    assert sentence.startswith("movekd: interrupted. What is sealed or saved stays; run the same")
    assert done.stdout == ""
    assert not list((tmp_path / "cache").rglob("*.lock"))
    done, _ = start()
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "cache") == undisturbed


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_command_with_its_sentence_once(start) -> None:
    for rank in (0, 1):
        done, _ = start(stop=f"{rank}:1:fail")
        assert done.returncode == 1
        assert sentences(done) == ["movekd: the disk of this test is away; bring it back."]
        assert done.stderr.count("Traceback") == 1  # torchrun's own
        assert done.stdout == ""


@pytest.mark.slow
def test_what_all_ranks_refuse_is_said_once(start, tmp_path) -> None:
    (tmp_path / "clip.yaml").write_text("provider: nobody\n")
    done, notes = start()
    assert (done.returncode, done.stdout, notes) == (1, "", {})
    (sentence,) = sentences(done)
    assert "clip.yaml" in sentence
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_two_nodes_share_a_build(command, undisturbed, tmp_path, snapshot) -> None:
    """Two torchruns of one process each, which meet at an address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    notes = tmp_path / "notes"
    notes.mkdir()
    words = [*meet, "--nproc-per-node", "1", "-m", "torchrun_build", *command("clip", "conv")]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *map(str, words)],
            env=environment(BUILD_NOTES=str(notes)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(bool(out) for out, _ in said) == [False, True]
    assert sorted(read_notes(notes)) == ["0-0", "0-1"]
    assert snapshot(tmp_path / "cache") == undisturbed
