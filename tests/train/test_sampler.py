"""Tests of movekd.train.sampler."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from movekd.train.sampler import EMPTY, GlobalOrderSampler, modality_length_order

lengths = st.lists(st.integers(-40, 40).filter(bool), max_size=80)


@given(st.integers(0, 100), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch(count, seed, epoch, grouped):
    signs = [(-1) ** i * (i + 1) for i in range(count)] if grouped else None

    def order():
        sampler = GlobalOrderSampler(count, seed, global_batch_size=4, lengths=signs)
        list(sampler)  # an iteration before changes nothing
        sampler.set_epoch(epoch)
        assert len(sampler) == count
        return list(sampler)

    assert sorted(order()) == list(range(count))
    assert order() == order()


@given(st.integers(0, 30), st.integers(1, 8))
def test_the_last_batch_of_all_processes_is_filled_up_with_nothing(count, multiple):
    order = list(GlobalOrderSampler(count, 0, multiple_of=multiple))
    assert len(order) == len(GlobalOrderSampler(count, 0, multiple_of=multiple))
    assert len(order) % multiple == 0
    assert order[:count] == list(GlobalOrderSampler(count, 0))
    assert order[count:] == [EMPTY] * (len(order) - count)
    assert len(order) - count < multiple


def test_seed_and_epoch_both_matter():
    orders = set()
    for seed in range(3):
        sampler = GlobalOrderSampler(50, seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 9


@given(lengths, st.integers(1, 9), st.integers(0, 3))
def test_every_sample_comes_once_and_batches_but_one_are_of_one_modality(values, size, seed):
    values = np.array(values, np.int64)
    order = modality_length_order(values, size, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(values)))
    batches = [values[order[start : start + size]] > 0 for start in range(0, len(order), size)]
    assert sum(bool(batch.any() and not batch.all()) for batch in batches) <= 1


def test_batches_are_of_like_length():
    values = np.random.default_rng(0).permutation(np.arange(1, 1001))
    order = modality_length_order(values, 10, np.random.default_rng(0))
    spreads = np.ptp(values[order].reshape(-1, 10), axis=1)
    assert spreads.mean() < 30  # of 900 and more when shuffled plainly
    firsts = values[order[::10]]
    assert not (np.diff(firsts) < 0).all()  # the batches themselves are shuffled
