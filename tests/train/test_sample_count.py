"""What teaches nothing is counted before the first step, as tokenising every sample would."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.corpus.conversations import Conversation
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from movekd.student.prompts import V1_SYSTEM
from movekd.student.tokenization import IGNORED
from movekd.student.tokenizer import load_tokenizer
from movekd.train.data import ConversationDataset
from movekd.train.sample_count import SampleCount, count_samples
from text_kit import write_mistral

NUM_IMAGE_TOKENS = 36


@pytest.fixture(scope="module")
def make(digits, tmp_path_factory):
    """Return a function that makes a data set of conversations."""
    corpus = open_corpus(digits.data)
    name = corpus.index["key"][0].as_py()
    digit = load_tokenizer(digits.config("finetune").student.language_model)
    mistral = load_tokenizer(write_mistral(tmp_path_factory.mktemp("mistral")))

    def build(turns_of, prompt="v1", recipe="revised", max_length=120, with_image=()):
        conversations = [
            Conversation(f"c{at}", (name,) if at in with_image else (), tuple(turns))
            for at, turns in enumerate(turns_of)
        ]
        for at in with_image:
            (role, text), *rest = conversations[at].turns
            turns = ((role, f"<image>\n{text}"), *rest)
            conversations[at] = Conversation(f"c{at}", (name,), turns)
        tokenizer = digit if prompt == "chat_template" else mistral
        return ConversationDataset(
            conversations, corpus, None, (), tokenizer, count_tokens, prompt, recipe, max_length
        )

    return build


def count_tokens(widths: Any, heights: Any) -> Any:
    """Return the tokens of each image: as many for all."""
    return np.full(len(widths), NUM_IMAGE_TOKENS)


def by_tokenising_all(dataset: ConversationDataset) -> tuple[int, list[str], list[str]]:
    """Return the number cut, and ids of the samples without an answer, and of those refused."""
    num_cut, unlearned, refused = 0, [], []
    for at, conversation in enumerate(dataset.conversations):
        answers = [text for role, text in conversation.turns if role == "gpt"]
        try:
            labels = dataset[at].labels
        except ConfigError:
            refused.append(conversation.id)
            continue
        num_cut += len(dataset.tokenize(at, None).input_ids) > dataset.max_length
        answers = answers[:1] if dataset.prompt == "plain" else answers
        if not "".join(answers).strip() or set(labels) == {IGNORED}:
            unlearned.append(conversation.id)
    return num_cut, unlearned, refused


WORDS = st.sampled_from(
    [
        "",
        " ",
        "two",
        "a longer answer of words",
        "文字" * 9,
        "\ufdfa",
        "</s>",
        "ASSISTANT:",
        "x" * 99,
    ]
)
TEXTS = st.lists(WORDS, max_size=8).map(" ".join)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
    lambda pairs: [t for q, a in pairs for t in (("human", q), ("gpt", a))]
)


@given(
    st.lists(TURNS, min_size=1, max_size=6),
    st.sampled_from(["plain", "v1", "chat_template"]),
    st.sampled_from(["official", "revised"]),
    st.integers(40, 400),
    st.booleans(),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=30, derandomize=True, deadline=None, database=None)
def test_the_count_is_that_of_tokenising_all(
    make, turns_of, prompt, recipe, length, has_image, num_ranks, needs_lengths
):
    dataset = make(turns_of, prompt, recipe, length, with_image=(0,) if has_image else ())
    found = SampleCount()
    for rank in range(num_ranks):
        share = count_samples(dataset, rank, num_ranks, needs_lengths=needs_lengths)
        assert len(share.lengths) == (share.num_samples if needs_lengths else 0)
        found.add(share)
    num_cut, unlearned, refused = by_tokenising_all(dataset)
    assert found.num_samples == len(turns_of)
    assert found.num_cut == num_cut
    assert sorted(i for ids in found.unlearned.values() for i in ids) == sorted(unlearned)
    assert sorted(identity for identity, _ in found.refused) == sorted(refused)
    if refused or len(unlearned) == len(turns_of):
        with pytest.raises(ConfigError) as caught:
            found.require_samples(length)
        assert len(str(caught.value)) < 2000
    else:
        found.require_samples(length)


def test_lengths_are_those_of_transformers_own_calls(make):
    """BOS by the tokenizer, each image as many tokens as it has features, cut at the limit."""
    pairs = [("How many?", "Two."), ("文字 \ufdfa?", "x" * 99), ("What? " * 40, "A word. " * 40)]
    turns = [[("human", q), ("gpt", a)] for q, a in pairs]
    dataset = make(turns, "plain", max_length=200, with_image=(0, 1, 2))
    images = NUM_IMAGE_TOKENS - 1
    expected = [len(dataset.tokenizer(f"<image>{a}\n").input_ids) + images for _, a in pairs]
    assert count_samples(dataset, needs_lengths=True).lengths == [min(n, 200) for n in expected]
    dataset = make(turns, "v1", max_length=200, with_image=(1,))
    asked = [pairs[0][0], f"<image>\n{pairs[1][0]}", pairs[2][0]]
    texts = [
        f"{V1_SYSTEM} USER: {q} ASSISTANT: {a}</s>" for q, (_, a) in zip(asked, pairs, strict=True)
    ]
    expected = [len(dataset.tokenizer(text).input_ids) for text in texts]
    expected[1] += images
    assert count_samples(dataset, needs_lengths=True).lengths == [min(n, 200) for n in expected]
    assert max(expected) > 200 > min(expected)
    dataset = make(turns, "chat_template", max_length=2000)
    expected = []
    for q, a in pairs:
        messages = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        expected.append(
            len(dataset.tokenizer.apply_chat_template(messages, return_dict=True).input_ids)
        )
    assert count_samples(dataset, needs_lengths=True).lengths == expected


@pytest.mark.parametrize("needs_lengths", [False, True])
def test_several_processes_count_as_one(make, needs_lengths):
    dataset = make([SHORT, LONG, LATE, BLANK, SHORT] * 500)
    one, two = (
        count_samples(dataset, 1, 2, needs_lengths=needs_lengths, num_processes=number)
        for number in (0, 2)
    )
    assert one == two
    assert len(one.lengths) == (1250 if needs_lengths else 0)
    assert one.num_cut == 500


def test_the_random_numbers_of_a_run_stay_the_same(make):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    count_samples(make([SHORT, LONG]), needs_lengths=True)
    assert torch.equal(torch.rand(3), expected)


SHORT = [("human", "How many?"), ("gpt", "Two.")]
LONG = [("human", "How many? " * 60), ("gpt", "Two.")]
LATE = [("human", "How many?"), ("gpt", "Two. " * 200)]
BLANK = [("human", "How many?"), ("gpt", " ")]


def test_the_sentence_says_how_many_and_which(make):
    dataset = make([SHORT, LONG, LATE, BLANK, SHORT])
    count = count_samples(dataset)
    assert count.sentence(120) == (
        "2 of 5 conversations cut at data.model_max_length 120, 1 of them without an answer left; "
        "1 have only empty answers (c1, c3)."
    )
    count.require_samples(120)


def test_nothing_left_to_learn_is_refused(make):
    with pytest.raises(
        ConfigError, match=r"2 of 3 .* 2 of them without.* Nothing is left to learn"
    ):
        count_samples(make([LONG, BLANK, LONG])).require_samples(120)


def test_all_conversations_that_cannot_be_used_are_named_at_once(make):
    human = [("human", "How many?")]
    with pytest.raises(ConfigError, match=r"'c1' has no 'gpt' turn.* 2 more of the 5 .*: c3, c4\."):
        make([SHORT, human, SHORT, human, [("human", "<image>"), ("gpt", "x")]])


def test_a_cut_through_an_image_is_refused_before_the_first_step(make):
    late = [("human", "How many?"), ("gpt", "Two. " * 30), ("human", "How many?"), ("gpt", "Two.")]
    whole = make([SHORT, late], max_length=110, with_image=(1,))
    turns = (*late[:-2], ("human", "<image>"), ("gpt", "Two."))
    whole.conversations[1] = Conversation("c1", whole.conversations[1].images, turns)
    count = count_samples(whole)
    with pytest.raises(ConfigError, match=r"conversation 'c1' has .* would cut an image"):
        count.require_samples(110)


def test_training_says_it_before_the_first_step(digits, tmp_path):
    lines: list[str] = []
    keys = ("training.max_steps=1", "distill=null")
    digits.train(tmp_path / "a", "pretrain", *keys, notify=lines.append)
    assert lines == []
    digits.train(tmp_path / "c", "pretrain", *keys, "data.model_max_length=60", notify=lines.append)
    (line,) = lines
    assert re.match(r"9 of 24 conversations cut at data\.model_max_length 60, 0 of them", line)
    with pytest.raises(ConfigError, match=r"24 of 24 .*Nothing is left to learn from"):
        digits.train(tmp_path / "b", "pretrain", *keys, "data.model_max_length=37")
    assert not (tmp_path / "b").exists()
