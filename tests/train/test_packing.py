"""Tests of movekd.train.packing: rows that hold every sample once, and how full they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.errors import ConfigError
from movekd.train.packing import pack_rows, padding_share, row_lengths
from movekd.train.sampler import GlobalOrderSampler

LONGEST = 40
lengths = st.lists(st.integers(1, LONGEST), max_size=120)
NUM_PATCHES = 576
MIX665K = (  # conversations, views, median of the text's tokens, deviation of its logarithm
    (40_688, 0, 1100, 0.9),  # ShareGPT, without images
    (56_681, 1, 330, 0.35),  # LLaVA-Instruct: conversations
    (23_240, 1, 190, 0.25),  # details
    (76_643, 1, 260, 0.25),  # reasoning
    (82_783, 1, 190, 0.30),  # VQAv2, several questions per image
    (72_140, 1, 330, 0.60),  # GQA, many questions per image
    (8_998, 1, 90, 0.20),  # OKVQA
    (80_000, 1, 190, 0.20),  # OCR-VQA
    (66_160, 1, 125, 0.12),  # A-OKVQA, one question with choices
    (21_953, 1, 130, 0.35),  # TextCaps
    (48_447, 1, 300, 0.60),  # RefCOCO, several boxes per image
    (86_417, 1, 350, 0.60),  # Visual Genome, several boxes per image
)
"""Sources of LLaVA-1.5's finetune data with their sizes (arXiv 2310.03744, and its data file).

The lengths are drawn: log-normal, with medians that were estimated from the form of each source. No
one has counted tokens of the file for this test.
"""


def drawn_lengths(max_length, seed=0):
    """Return 664,150 lengths in tokens, cut at ``max_length``."""
    random = np.random.default_rng(seed)
    parts = [
        NUM_PATCHES * views + median * np.exp(deviation * random.standard_normal(number))
        for number, views, median, deviation in MIX665K
    ]
    return np.minimum(np.concatenate(parts).astype(np.int64), max_length)


@given(lengths, st.integers(0, 3))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(found, seed):
    rows = pack_rows(found, LONGEST, seed)
    assert sorted(sample for row in rows for sample in row) == list(range(len(found)))
    assert rows == pack_rows(found, LONGEST, seed)
    tokens = sorted(row_lengths(rows, found).tolist())
    assert all(0 < number <= LONGEST for number in tokens)
    assert sum(tokens[:2]) > LONGEST or len(tokens) < 2  # no two rows would fit into one


def test_the_seed_decides_what_stands_together():
    found = [7, 7, 9, 9, 5, 5, 3, 3] * 10
    one, other = (pack_rows(found, LONGEST, seed) for seed in (0, 1))
    assert len(one) == len(other)
    assert {frozenset(row) for row in one} != {frozenset(row) for row in other}


@pytest.mark.parametrize("found", [[3, LONGEST + 1], [0, 3]])
def test_a_sample_that_is_no_row_is_refused(found):
    with pytest.raises(ConfigError, match=r"expected 1 to data\.model_max_length 40"):
        pack_rows(found, LONGEST, 0)


@given(st.lists(st.integers(1, LONGEST), min_size=1), st.integers(1, 9))
def test_the_padding_is_what_fills_each_batch_to_its_longest_row(tokens, size):
    batches = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    positions = sum(max(batch) * len(batch) for batch in batches)
    assert padding_share(tokens, size) == pytest.approx(1 - sum(tokens) / positions)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=30)
def test_a_step_keeps_its_rows_and_trains_the_longest_first(count, size, epoch):
    tokens = np.random.default_rng(count).integers(1, LONGEST, count)
    keys = {"global_batch_size": size, "multiple_of": size}
    plain, ordered = (
        GlobalOrderSampler(count, 3, **keys, row_lengths=found) for found in (None, tokens)
    )
    for sampler in (plain, ordered):
        sampler.set_epoch(epoch)
    expected, found = list(plain), list(ordered)
    for at in range(0, len(expected), size):
        step = found[at : at + size]
        assert sorted(step) == sorted(expected[at : at + size])
        real = [int(tokens[row]) for row in step if row >= 0]
        assert real == sorted(real, reverse=True)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("max_length", "most_unused"),
    [(2048, 0.16), pytest.param(4096, 0.05, marks=pytest.mark.slow)],
)
def test_the_padding_of_lengths_like_mix665ks_is_below_five_percent(max_length, most_unused):
    """With LLaVA's steps of 128 in batches of 16: of 664,150 samples, a fifth is taken here.

    Rows of 2,048 are not full: two images are 1,152 tokens with what is said about them, and few
    third ones fit. Rows of about equal length share a batch, so little of that is padding.
    """
    found = drawn_lengths(max_length)[::5]
    assert len(found) > 100_000
    tokens = row_lengths(pack_rows(found.tolist(), max_length, 0), found.tolist())
    order = list(GlobalOrderSampler(len(tokens), 0, global_batch_size=128, row_lengths=tokens))
    assert padding_share(tokens[order], 16) < 0.05
    assert 1 - tokens.sum() / (len(tokens) * max_length) < most_unused
    unpacked = np.random.default_rng(0).permutation(found)
    assert padding_share(unpacked, 16) > 0.3  # what the same samples waste without packing
