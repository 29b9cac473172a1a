"""Tests of movekd.distributed: which process prints, what a restart is, what ranks exchange."""

import sys

import pytest
import torch

from movekd import distributed
from movekd.cli.main import main
from movekd.errors import ConfigError


@pytest.fixture
def be(monkeypatch, tmp_path):
    """Return a function that makes this process one of a start of torchrun."""

    def become(attempt, local_rank, launch="none_abc"):
        folder = tmp_path / launch / f"attempt_{attempt}" / str(local_rank)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        monkeypatch.setenv("RANK", str(local_rank))

    return become


def test_one_process_of_an_attempt_speaks_and_no_attempt_repeats_another(be):
    be(0, 1)
    assert distributed.should_print("the disk is full")
    be(0, 0)
    assert not distributed.should_print("another process has ended")
    be(1, 0)
    assert not distributed.should_print("the disk is full")
    be(2, 1)
    assert distributed.should_print("the disk is away")
    be(0, 0, launch="none_def")
    assert distributed.should_print("the disk is full")


def test_alone_and_without_torchruns_folder_everything_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for file in ("", "/dev/null", str(tmp_path / "error.json"), str(tmp_path / "attempt_0/0/e")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        for _ in range(2):
            assert distributed.should_print("the same")
        assert distributed.launch_id() is None
    assert distributed.is_main_process()


def test_a_launch_stays_the_same_over_its_restarts_and_processes(be):
    names = set()
    for launch in ("none_abc", "none_def"):
        for attempt in (0, 3):
            for local_rank in (0, 1):
                be(attempt, local_rank, launch)
                names.add(distributed.launch_id())
                assert distributed.is_main_process() == (local_rank == 0)
    assert len(names) == 2


def test_only_torchrun_makes_ranks(monkeypatch):
    """Schedulers set RANK and WORLD_SIZE for jobs that know nothing of each other."""
    numbers = {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 8}
    for name, value in numbers.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.torchrun_rank() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert distributed.torchrun_rank() == distributed.Rank(9, 16, 1, 8, 3)


def test_wrong_words_are_shown_once(be, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["movekd", "train", "--confg", "x"])
    for local_rank in (1, 0):
        be(0, local_rank)
        with pytest.raises(SystemExit, match="2"):
            main()
    assert capsys.readouterr().err.count("No such option") == 1


def test_a_single_process_needs_no_connection():
    assert distributed.gather("a") == ["a"]
    assert distributed.broadcast_decision(lambda: "b") == "b"
    assert distributed.sum_over_ranks(torch.tensor(3.0)) == 3
    assert distributed.mean_over_ranks(torch.tensor(3.0), 0) == 3
    distributed.destroy_process_group()


def test_the_connection_is_closed():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert distributed.gather("a") == ["a"]
    assert distributed.sum_over_ranks(torch.tensor(3.0)) == 3
    assert distributed.mean_over_ranks(torch.tensor(3.0), 5) == 3
    with pytest.raises(ConfigError, match="no"):
        distributed.broadcast_decision(refuse)
    distributed.destroy_process_group()
    assert not torch.distributed.is_initialized()


def refuse():
    raise ConfigError("no")
