"""The pool of workers, over a stand-in for Ray whose workers die when they are told to."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.errors import CacheError, ConfigError
from movekd.extract.ray.worker import Report
from movekd.extract.ray.worker_pool import LIVES, WorkerPool


class Died(Exception):
    pass


class Call:
    """A method of a remote worker."""

    def __init__(self, ray, kind):
        self.ray, self.kind = ray, kind

    def remote(self, item=None):
        return (next(self.ray.numbers), self.kind, item and str(item))


class Ray:
    """As much of Ray as the pool uses; ``fates`` says of each answer what becomes of it."""

    exceptions = SimpleNamespace(
        RayError=Died,
        RayActorError=Died,
        WorkerCrashedError=Died,
        NodeDiedError=Died,
        ObjectLostError=Died,
        OutOfMemoryError=Died,
    )

    def __init__(self, fates, places):
        self.numbers, self.fates, self.places = iter(range(10**6)), iter(fates), iter(places)
        self.living, self.most = 0, 0

    def remote(self, **_):
        return lambda kind: SimpleNamespace(remote=self.hire)

    def hire(self, _):
        self.living += 1
        self.most = max(self.most, self.living)
        return SimpleNamespace(loaded=Call(self, "load"), build=Call(self, "build"))

    def wait(self, answers, num_returns, timeout):
        return answers[-1:], answers[:-1]

    def get(self, answer):
        fate = next(self.fates, None)
        if fate == "dies":
            raise Died("killed")
        return Report({"clip": 1.0}) if fate is None else Report({}, *fate)

    def kill(self, worker):
        self.living -= 1


def pool(fates, places=(), asked=3):
    ray = Ray(fates, places)
    cluster = SimpleNamespace(ray=ray, num_gpus=0, num_workers=lambda: next(ray.places, asked))
    return WorkerPool(cluster, None), ray


ITEMS = [{"clip": [number]} for number in range(7)]


@given(
    st.lists(st.sampled_from(["dies", None, None]), max_size=LIVES - 1),
    st.lists(st.integers(1, 5), max_size=9),
)
def test_every_item_is_done_once_whoever_dies_and_joins(fates, places) -> None:
    workers, ray = pool(fates, places)
    done = [item for item, _ in workers.work_through(ITEMS)]
    assert sorted(done, key=str) == ITEMS
    assert ray.living == 0
    assert ray.most <= 5


def test_no_more_workers_than_items() -> None:
    workers, ray = pool([], asked=99)
    assert len(list(workers.work_through(ITEMS))) == len(ITEMS)
    assert ray.most == len(ITEMS)


@pytest.mark.parametrize(
    ("fates", "doing"),
    [(["dies"] * 99, "loading the teachers"), ([None, "dies"] * 99, "over the same work item")],
)
def test_workers_that_keep_dying_are_a_failure(fates, doing) -> None:
    workers, ray = pool(fates, asked=1)
    with pytest.raises(CacheError, match=rf"^{LIVES} workers died .* {doing}.*safe") as caught:
        list(workers.work_through(ITEMS))
    assert caught.value.__notes__ == ["killed"]
    assert ray.living == 0


def test_a_workers_error_ends_all() -> None:
    workers, ray = pool([None, None, ("ConfigError", "its sentence", "its trace")])
    with pytest.raises(ConfigError, match=r"^its sentence\b"):
        list(workers.work_through(ITEMS))
    assert ray.living == 0
