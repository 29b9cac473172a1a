"""Tests of movekd.train.mixture: what an epoch draws, and in which order it trains."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.config import validate
from movekd.errors import ConfigError
from movekd.train.data_keys import DataConfig, SourceConfig
from movekd.train.mixture import Mixture, Part
from movekd.train.sampler import EMPTY, GlobalOrderSampler
from movekd.train.sources import Source


def mixture(sizes, weights):
    """Return a mixture of parts that have a length and nothing else."""
    parts = []
    for size, weight in zip(sizes, weights, strict=True):
        keys = SourceConfig(shards=Path("data"), weight=weight)
        parts.append(Part(Source(keys, SimpleNamespace(data_dir="data"), None), range(size)))
    return Mixture(parts)


PARTS = st.lists(st.tuples(st.integers(1, 40), st.floats(0.02, 4)), min_size=1, max_size=4)


@given(PARTS, st.integers(0, 2**31), st.integers(1, 12))
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_at_any_time_every_sample_of_a_part_was_taken_equally_often_or_once_more(
    parts, seed, num_epochs
):
    sizes, weights = zip(*parts, strict=True)
    mixed = mixture(sizes, weights)
    counts = np.zeros(len(mixed), np.int64)
    starts = np.cumsum([0, *sizes])
    for epoch in range(num_epochs):
        drawn = mixed.draw(seed, epoch)
        assert len(drawn) == mixed.num_drawn
        np.add.at(counts, drawn, 1)
        for part, (begin, size) in enumerate(zip(starts, sizes, strict=False)):
            mine = counts[begin : begin + size]
            per_epoch = max(1, round(weights[part] * size))
            assert mine.sum() == (epoch + 1) * per_epoch
            least = (epoch + 1) * per_epoch // size
            assert mine.min() == least
            assert mine.max() == math.ceil((epoch + 1) * per_epoch / size)


def test_a_weight_is_a_number_of_passes():
    mixed = mixture([10, 10, 10], [1, 2, 0.5])
    first, second = mixed.draw(3, 0), mixed.draw(3, 1)
    counts = np.bincount(first, minlength=30)
    assert counts[:10].tolist() == [1] * 10
    assert counts[10:20].tolist() == [2] * 10
    assert sorted(counts[20:].tolist()) == [0] * 5 + [1] * 5
    halves = [set(drawn[drawn >= 20].tolist()) for drawn in (first, second)]
    assert halves[0] | halves[1] == set(range(20, 30))
    assert not np.array_equal(np.sort(mixed.draw(4, 0)), np.sort(first))  # another seed


@pytest.mark.parametrize("weights", [[1, 1], [2, 0.5], [0.3, 1.7]])
def test_the_steps_of_an_epoch_hold_what_it_draws_and_one_modality_each(weights):
    mixed = mixture([60, 45], weights)
    words = np.arange(1, 106) * np.where(np.arange(105) % 3 == 0, -1, 1)
    sampler = GlobalOrderSampler(
        len(mixed),
        7,
        global_batch_size=8,
        lengths=words.tolist(),
        micro_batch_size=4,
        multiple_of=4,
        draw=mixed.draw,
    )
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        order = np.array(list(sampler))
        assert len(order) == len(sampler)
        taken = order[order != EMPTY]
        assert sorted(taken) == sorted(mixed.draw(7, epoch))
        steps = [words[taken[at : at + 8]] > 0 for at in range(0, len(taken) - 16, 8)]
        assert all(step.all() or not step.any() for step in steps)
        assert {bool(step.all()) for step in steps} == {True, False}


def test_rows_of_a_step_go_from_the_longest_to_the_shortest():
    mixed, lengths = mixture([30, 20], [1, 1.5]), np.arange(50) * 7 % 50 + 1
    sampler = GlobalOrderSampler(
        len(mixed), 1, global_batch_size=10, row_lengths=lengths, draw=mixed.draw
    )
    order = np.array(list(sampler))
    assert sorted(order) == sorted(mixed.draw(1, 0))
    steps = lengths[order].reshape(-1, 10)
    assert (np.diff(steps, axis=1) <= 0).all()


def test_one_corpus_seen_once_has_the_order_that_it_had_before():
    """Older runs resume: the order of a run without sources is that of a plain shuffle."""
    sampler = GlobalOrderSampler(50, 42, multiple_of=4)
    sampler.set_epoch(3)
    expected = np.random.default_rng([42, 3]).permutation(50).tolist()
    assert list(sampler) == [*expected, EMPTY, EMPTY]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "shards is missing; give the folder .* or several of them in sources"),
        (
            {"shards": "a", "conversations": ["b"], "sources": [{"shards": "c"}]},
            "shards, conversations and sources are both given; expected one of them",
        ),
        ({"sources": [{"shards": "c", "weight": 0}]}, r"sources\.0\.weight: .*greater than 0"),
        ({"sources": [{"shards": "c", "wieght": 1}]}, r"'sources\.0\.wieght'.*[Dd]id you mean"),
        ({"sources": [{"shards": "c", "weight": float("nan")}]}, r"sources\.0\.weight"),
    ],
)
def test_sources_that_mean_nothing_are_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        validate(DataConfig, keys, "data")
