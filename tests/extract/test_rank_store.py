"""What ranks tell each other, in threads of one process that share a store."""

import threading
from functools import partial
from typing import NamedTuple

import pytest
import torch

from builds import OPTIONS, build
from movekd.distributed import Rank
from movekd.errors import CacheError, ConfigError, MovekdError
from movekd.extract import rank_store
from movekd.extract.rank_store import RankStore
from movekd.extract.teacher_loop import TeacherJob
from movekd.extract.torchrun import TorchrunExecutor, build_share, divide


def rank(index, world_size=2):
    return Rank(index, world_size, index, world_size, 0)


def in_thread(function):
    """Start a function in a thread; return the thread, and what it raised."""
    raised = []

    def run() -> None:
        try:
            function()
        except MovekdError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(rank_store, "GRACE_S", 0.0)
    monkeypatch.setattr(rank_store, "BEAT_S", 0.01)
    monkeypatch.setattr(rank_store, "POLL_S", 0.01)
    return torch.distributed.HashStore()


def test_three_ranks_leave_the_bytes_of_one(
    store, tmp_path, corpus_dir, tiny_specs, undisturbed, snapshot
) -> None:
    """Twice with one store, as after a restart: the old names in it mean nothing."""
    for attempt in ("first", "second"):
        shown = []

        def share(index: int) -> None:
            with RankStore(rank(index, 3), store) as ranks:
                build_share(ranks, OPTIONS)

        others = [in_thread(partial(share, index)) for index in (1, 2)]
        with RankStore(rank(0, 3), store) as ranks:
            summaries = build(
                tmp_path / attempt,
                corpus_dir,
                tiny_specs,
                executor=TorchrunExecutor(ranks),
                progress=partial(note, shown),
            )
        for thread, raised in others:
            thread.join()
            assert raised == []
        assert [summary.images_built for summary in summaries] == [24, 24]
        assert snapshot(tmp_path / attempt) == undisturbed
        built = [counts for counts in shown if counts[0] == "clip: build"]
        assert built == sorted(built)  # one count of all ranks, which never falls
        assert built[-1] == ("clip: build", 24, 24)


def test_the_blocks_that_lack_something_are_dealt_out_in_turn() -> None:
    """A resumed build keeps all ranks busy, and a block's images are decoded by one of them."""
    jobs = [
        TeacherJob(Named(name), Store(Layout(rows)), shards)
        for name, rows, shards in (("clip", 1024, [1, 4]), ("sam", 512, [2, 3, 8, 12, 16]))
    ]
    assert divide(jobs, 3) == [
        {"clip": [1], "sam": [2, 3, 16]},
        {"clip": [4], "sam": [8]},
        {"sam": [12]},
    ]
    assert divide(jobs, 5)[4] == {}


class Named(NamedTuple):
    name: str


class Layout(NamedTuple):
    rows_per_shard: int


class Store(NamedTuple):
    layout: Layout


def note(notes, *counts) -> None:
    notes.append(counts)


def test_a_rank_that_fails_tells_rank_0(store) -> None:
    def fail() -> None:
        with RankStore(rank(1), store) as ranks:
            ranks.receive()
            raise CacheError("the disk is away; bring it back.")

    thread, raised = in_thread(fail)
    found = r"rank 1 on .*: the disk is away; bring it back\. What is sealed is safe: run the same"
    with RankStore(rank(0), store) as ranks:
        ranks.send([None, {}])
        with pytest.raises(CacheError, match=found):
            wait_for_results(ranks)
    thread.join()
    assert len(raised) == 1


def wait_for_results(ranks) -> None:
    while ranks.results() is None:
        pass


def test_rank_0_that_fails_tells_those_that_wait(store) -> None:
    def wait() -> None:
        with RankStore(rank(1), store) as ranks:
            ranks.receive()

    def refuse() -> None:
        with RankStore(rank(0), store):
            raise ConfigError("the grid is wrong.")

    thread, raised = in_thread(wait)
    with pytest.raises(ConfigError):
        refuse()
    thread.join()
    assert "rank 0 on" in str(raised[0])
    assert ": the grid is wrong. What is sealed" in str(raised[0])


def test_a_rank_without_a_sign_of_life_is_lost(store, monkeypatch) -> None:
    monkeypatch.setattr(rank_store, "LOST_S", 0.05)
    found = r"rank 1 has shown no sign of life for .*Run the same command again to resume"
    with RankStore(rank(0), store) as ranks, pytest.raises(CacheError, match=found):
        ranks.send([None, {}])


def test_a_store_that_is_gone_is_told(store) -> None:
    class Gone:
        def check(self, *given):
            raise torch.distributed.DistNetworkError("Connection reset by peer\nframes")

        get = set = check

    found = r"rank 0 on .* does not reach torchrun's store \(Connection reset by peer\); expected"
    with pytest.raises(CacheError, match=found), RankStore(rank(0), Gone()):
        pass
