"""Tests of movekd.evaluate.exact_match."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.evaluate.exact_match import (
    Score,
    exact_match,
    normalise,
    split_questions,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Wilson intervals as published in tables and by statsmodels
        (0, 10, 0.0, 0.277533),
        (1, 10, 0.017876, 0.404150),
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1.0),
        (81, 263, 0.255289, 0.366210),
    ],
)
def test_interval_is_wilsons(correct, total, low, high):
    assert Score(correct, total).interval == pytest.approx((low, high), abs=2e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_accuracy_and_stays_in_0_1(counts):
    score = Score(*counts)
    low, high = score.interval
    assert 0 <= low <= score.accuracy + 1e-12
    assert score.accuracy - 1e-12 <= high <= 1
    mirrored = Score(score.total - score.correct, score.total).interval
    assert mirrored == pytest.approx((1 - high, 1 - low))


@given(st.text())
def test_normalise_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("given_", ["Yes", "yes.", "  YES !", '"yes"', "yes\n"])
def test_case_blanks_and_outer_punctuation_do_not_matter(given_):
    assert normalise(given_) == "yes"


def test_inner_punctuation_and_words_matter():
    assert normalise("3.5") == "3.5"
    assert normalise("a  big   bus") == "a big bus"
    assert normalise("no yes") != normalise("yes")


def question(identity, kind=None, *turns):
    return Conversation(identity, ("a.png",), turns or (("human", "?"), ("gpt", "7")), kind)


def test_scores_are_counted_a_type_with_all_last():
    asked = [question("1", "sum"), question("2", "sum"), question("3"), question("4", "zoo")]
    scores = exact_match(asked, ["7", "7", "7", "7"], ["7.", "8", "7", ""])
    assert list(scores) == ["other", "sum", "zoo", "all"]
    assert [(s.correct, s.total) for s in scores.values()] == [(1, 1), (1, 2), (0, 1), (2, 4)]


def test_no_question_is_an_error():
    with pytest.raises(ConfigError, match="the file has no question to evaluate"):
        exact_match([], [], [])


def test_the_last_answer_alone_is_split_off():
    turns = (("human", "a?"), ("gpt", "1"), ("human", "b?"), ("gpt", "2"))
    asked, right = split_questions([question("1", "sum", *turns)])
    assert right == ["2"]
    assert asked[0].turns == turns[:3]
    assert (asked[0].id, asked[0].images, asked[0].question_type) == ("1", ("a.png",), "sum")


@pytest.mark.parametrize("turns", [(("human", "a?"),), (("gpt", "1"),)])
def test_a_question_without_an_answer_is_named(turns):
    with pytest.raises(
        ConfigError, match=r"'x' does not end with a 'gpt' turn; expected the right"
    ):
        split_questions([question("x", None, *turns)])
