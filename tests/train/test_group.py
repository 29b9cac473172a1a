"""Tests of movekd.train.group: what the processes of a run do together."""

from torch import distributed

from movekd.train.group import gather, leave


def test_one_process_needs_no_connection():
    assert gather("a") == ["a"]
    leave()


def test_the_connection_is_given_back():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert gather("a") == ["a"]
    leave()
    assert not distributed.is_initialized()
