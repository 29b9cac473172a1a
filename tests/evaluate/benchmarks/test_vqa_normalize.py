"""Tests of movekd.evaluate.benchmarks.vqa_normalize: hand-worked cases of each rule."""

import doctest
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movekd.evaluate.benchmarks import vqa_normalize
from movekd.evaluate.benchmarks.vqa_normalize import CONTRACTIONS, normalise, normalise_evalai

LETTERS = st.text("abcdegt0159 .,'-?!/:", max_size=24)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("Yes", "yes"),  # lower case
        ("  red \n car ", "red car"),
        ("two", "2"),  # number words
        ("ten of ten", "10 of 10"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("twofold", "twofold"),
        ("the dog and a cat, an ox", "dog and cat ox"),  # articles
        ("theatre", "theatre"),
        ("a", ""),
        ("dont", "don't"),  # contractions
        ("couldntve", "couldntve"),  # two apostrophes are missing: not in the table
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("twas", "'twas"),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("girl's", "girl's"),  # apostrophe and colon stay
        ("2:50 pm", "2:50 pm"),
        ("red/blue", "red blue"),  # a mark between letters becomes a space
        ("red / blue", "red blue"),  # beside a space it goes: one space, not two
        ("red- blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("-5", "5"),
        ("what?!", "what"),
        ("(left)", "left"),
        ("100,978", "100978"),  # a comma between digits goes without a space
        ("1,000,000", "1000000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("t-shirt 1,000", "tshirt 1000"),  # then every other mark does, too
        ("3.5", "3.5"),  # a decimal point stays
        (".5", ".5"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        ("no.", "no"),
        ("no.1", "no.1"),
    ],
)
def test_rule(given_, expected):
    assert normalise(given_) == expected


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("Joe's Bar", "joe 's bar"),  # TextVQA's own: 's is a word
        ("it's", "it 's"),
        ("red,blue", "redblue"),  # commas go before marks are looked at
        ("100,978", "100978"),
        ("t-shirt 1,000", "t shirt 1000"),  # so no comma is left to take the hyphen along
        ("what?ever", "whatever"),
        ("The Two.", "2"),
        ("A\tB", "b"),
    ],
)
def test_rule_of_textvqa(given_, expected):
    assert normalise_evalai(given_) == expected


def test_a_contraction_misses_one_apostrophe():
    published = {key: word for key, word in CONTRACTIONS.items() if key != "somebody'd"}
    for misspelt, word in published.items():
        assert misspelt.replace("'", "") == word.replace("'", "")
        assert misspelt.count("'") == word.count("'") - 1
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == "y'all'd've"
    for absent in ("shes", "lets", "id", "ill", "wed", "were", "well", "shell", "its"):
        assert absent not in CONTRACTIONS, "another word, and not in the table"


@given(LETTERS)
def test_no_mark_article_or_doubled_space_is_left(text):
    for form in (normalise(text), normalise_evalai(text)):
        assert not set(form) & set("?!/,-")
        assert form == " ".join(form.split())
        assert form == form.lower()
        assert not set(form.split()) & {"a", "an", "the"}


@given(LETTERS)
def test_case_and_outer_blanks_do_not_matter(text):
    assert normalise(f" {text.upper()}\n") == normalise(text)


def test_the_example_in_the_docstring():
    assert doctest.testmod(vqa_normalize).failed == 0
    assert doctest.testmod(vqa_normalize).attempted == 1


@pytest.fixture(scope="module")
def published():
    """The same form in lmms-eval, where that is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric")
    return metric.EvalAIAnswerProcessor


@pytest.mark.filterwarnings("ignore")  # its pattern's flags stand where a count belongs
@given(st.text("abcdegt0159 .,'-?!/:;()=+_@`\n\t\"[]{}<>\\", max_size=30))
def test_textvqas_form_is_lmms_evals(published, text):
    assert normalise_evalai(text) == published()(text)


def test_the_contractions_are_lmms_evals(published):
    table = published.CONTRACTIONS
    lower = {key: word for key, word in table.items() if key == key.lower() and key != word}
    assert lower == CONTRACTIONS
