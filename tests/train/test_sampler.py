"""Tests of movekd.train.sampler, against the order that LLaVA's own program gave."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.train.sampler import EMPTY, GlobalOrderSampler, modality_length_order

LLAVA = json.loads(Path(__file__).with_name("llava_order.json").read_text())
lengths = st.lists(st.integers(-40, 40).filter(bool), max_size=80)
divisions = st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (9, 9)])


class Replayed:
    """Gives the permutations that LLaVA drew, in its order."""

    def __init__(self, permutations):
        self._left = [np.array(permutation, np.int64) for permutation in permutations]

    def permutation(self, x):
        drawn = self._left.pop(0)
        return drawn if isinstance(x, int) else np.asarray(x)[drawn]


def word_counts(count, share_of_text=0.2):
    """Many short conversations and a few long ones, as instruction data has them."""
    random = np.random.default_rng(0)
    words = np.exp(random.normal(4, 1, count)).astype(np.int64) + 1
    return np.where(random.random(count) < share_of_text, -words, words)


@pytest.mark.parametrize("case", LLAVA["cases"], ids=lambda case: case["name"])
def test_every_sample_stands_where_llava_puts_it(case):
    micro = case["per_device_batch"]
    step = micro * case["micro_batches"]
    random = Replayed(case["permutations"])
    order = modality_length_order(np.array(case["lengths"]), step, micro, random).tolist()
    if case["name"] == "text only":
        # Without any image LLaVA balances with negative lengths, which fills one micro-batch with
        # all the long samples. Here the steps are its steps, and their micro-batches balanced.
        for start in range(0, len(order), step):
            assert set(order[start : start + step]) == set(case["order"][start : start + step])
        return
    assert order == case["order"]


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
        for signs in (None, [(-1) ** i * (i + 1) for i in range(50)]):
            sampler = GlobalOrderSampler(50, seed, global_batch_size=4, lengths=signs)
            for epoch in range(3):
                sampler.set_epoch(epoch)
                orders.add(tuple(sampler))
    assert len(orders) == 18


@given(lengths, divisions, st.integers(0, 3))
def test_every_sample_comes_once_and_all_steps_but_the_last_two_are_of_one_modality(
    values, division, seed
):
    values = np.array(values, np.int64)
    step, micro = division
    order = modality_length_order(values, step, micro, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(values)))
    has_image = values[order] > 0
    steps = [has_image[start : start + step] for start in range(0, len(order), step)]
    assert all(one.all() or not one.any() for one in steps[:-2])


@given(lengths, st.integers(0, 3))
def test_the_samples_of_a_step_do_not_depend_on_how_the_step_is_divided(values, seed):
    """So a run resumes with another number of processes: the steps stay what they were."""
    values = np.array(values, np.int64)

    def steps(micro):
        order = modality_length_order(values, 12, micro, np.random.default_rng(seed)).tolist()
        return [sorted(order[start : start + 12]) for start in range(0, len(order), 12)]

    whole = steps(12)
    assert all(
        # Samples of one modality that fill no step are dealt out in another order, but stay last.
        steps(micro)[: len(values) // 12] == whole[: len(values) // 12]
        for micro in (1, 2, 3, 4, 6)
    )


def test_a_step_is_as_mixed_as_a_random_draw_and_all_steps_have_as_much_to_read():
    """8 x 16 samples per step: spread within a step, and coefficient of variation across steps.

    Sorting over many steps would make each step one kind of task: a tenth of the spread, and ten
    times the variation.
    """
    values = word_counts(12_800)
    order = modality_length_order(values, 128, 16, np.random.default_rng(0))[: -2 * 128]
    steps = np.abs(values[order]).reshape(-1, 128)
    words = np.abs(values)
    assert steps.std(axis=1).mean() == pytest.approx(words.std(), rel=0.1)
    totals = steps.sum(axis=1)
    by_chance = words.std() / words.mean() / np.sqrt(128)
    assert totals.std() / totals.mean() == pytest.approx(by_chance, rel=0.3)


def test_the_micro_batches_of_a_step_have_about_as_many_words():
    values = word_counts(12_800)

    def imbalance(order):
        """Words of the fullest micro-batch over the mean, averaged over the steps."""
        words = np.abs(values[order[: -2 * 128]]).reshape(-1, 8, 16).sum(axis=2)
        return (words.max(axis=1) / words.mean(axis=1)).mean() - 1

    balanced = imbalance(modality_length_order(values, 128, 16, np.random.default_rng(0)))
    shuffled = imbalance(np.random.default_rng(0).permutation(len(values)))
    assert balanced < 0.05 < 0.2 < shuffled
