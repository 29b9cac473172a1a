"""Tests of chat templates: what the model is asked with, and which tokens are learned.

Published kinds of templates: with and without generation marks, with thoughts, with dates.
"""

import copy
from datetime import datetime
from itertools import product
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.student import load_tokenizer
from movekd.student.chat_template import settled
from movekd.student.export.chat_template import chat_template
from movekd.student.generation import stop_tokens
from movekd.student.prompts import render_conversation, render_question
from movekd.student.tokenization import IGNORED, tokenize_conversation, tokenize_question
from small_language_model import KINDS, write_smollm2
from text_kit import CHATML, INST, unmarked, write_mistral

FAST = ("llama3", "qwen3", "gemma3", "smollm3")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
ANSWERS = ["2", "A cat.", "猫 (B)", " blank", "\nnewline", "10 ", ""]
BEFORE = [None, "Yes.", "\nodd", "<think>\nhm\n</think>\n\nNo."]
"""The model's turn before, if there is one."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return the tokenizer of a kind as movekd loads it; each is loaded once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            KINDS[name].write_tokenizer(folder)
            loaded[name] = load_tokenizer(folder)
        return loaded[name]

    return load


def conversation(*turns):
    roles = ("human", "gpt")
    said = tuple((roles[at % 2], text) for at, text in enumerate(turns))
    images = ("a",) * sum(text.count("<image>") for text in turns)
    return Conversation("c", images, said)


def tokenize(turns, tokenizer):
    return tokenize_conversation(
        conversation(*turns),
        tokenizer,
        prompt="chat_template",
        num_image_tokens=3,
        recipe="revised",
    )


def learned(found, tokenizer):
    """Return the text of the learned tokens, with a bar between those that stand apart."""
    runs, before = [], None
    for at, label in enumerate(found.labels):
        if label == IGNORED:
            continue
        if before != at - 1:
            runs.append([])
        runs[-1].append(label)
        before = at
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", NAMES)
def test_question_and_labels_are_all_tokens(tokenizers, name):
    """What a model is asked with, and what it has learned to say, leave no token between them."""
    tokenizer = tokenizers(name)
    for answer, before in product(ANSWERS, BEFORE):
        asked = ["How many?\n<image>"]
        if before is not None:
            asked += [before, "And now?"]
        question = tokenize_question(
            conversation(*asked), tokenizer, prompt="chat_template", num_image_tokens=3
        )
        whole = tokenize([*asked, answer], tokenizer)
        assert whole.input_ids[: len(question)] == question, (before, answer)
        assert whole.labels[len(question) :] == whole.input_ids[len(question) :], (before, answer)
        assert whole.input_ids[-1] == whole.labels[-1]
        assert set(whole.labels[: len(question)]) != {IGNORED} or before is None


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_the_answers_and_their_end_tokens(tokenizers, name):
    tokenizer = tokenizers(name)
    stops = stop_tokens(tokenizer, tokenizer, "chat_template")
    found = tokenize(["<image>\nWhat?", "A bus.", "And?", "Red (B)", "Why?", "So."], tokenizer)
    said = learned(found, tokenizer)
    assert len(said) == 3
    for text, answer in zip(said, ("A bus.", "Red (B)", "So."), strict=True):
        (end,) = [stop for stop in stops if text.endswith(tokenizer.decode([stop]))]
        assert text.removesuffix(tokenizer.decode([end])).strip() == answer
    if name in ("qwen3", "smollm3"):
        assert "<think>" not in "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_answers_end_where_generation_stops(tokenizers, name):
    tokenizer = tokenizers(name)
    ends = KINDS[name].generation.get("eos", ())
    settings = SimpleNamespace(eos_token_id=tokenizer.convert_tokens_to_ids(list(ends)))
    stops = stop_tokens(tokenizer, settings, "chat_template")
    assert tokenizer.convert_ids_to_tokens(stops) == list(KINDS[name].stops)
    assert tokenize(["Which?", "This."], tokenizer).labels[-1] in stops


def test_thoughts_are_switched_off_in_question_and_answer(tokenizers):
    tokenizer = tokenizers("qwen3")
    asked = conversation("What?")
    text = render_question(asked, tokenizer, "chat_template").text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    stock = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What?"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert text == stock
    text = render_question(asked, tokenizers("smollm3"), "chat_template").text
    assert "Reasoning Mode: /no_think" in text


def test_earlier_turns_stand_as_the_template_writes_them_before_later_ones(tokenizers):
    """Qwen3 takes thoughts out of earlier turns; the text is stock's, and all answers learned."""
    tokenizer = tokenizers("qwen3")
    turns = ["What?", "<think>\nhm\n</think>\n\nA bus.", "And?", "Red."]
    rendered = render_conversation(conversation(*turns), tokenizer, "chat_template")
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
    stock = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    assert rendered.text == stock
    assert [stock[start:end] for start, end in rendered.answers] == [
        "A bus.<|im_end|>",
        "Red.<|im_end|>",
    ]
    assert stock.count("<think>") == 1


@pytest.mark.parametrize("name", ["llama3", "smollm3"])
def test_no_prompt_depends_on_the_day(tokenizers, name):
    tokenizer = tokenizers(name)
    text = render_question(conversation("What?"), tokenizer, "chat_template").text
    assert {"llama3": "Date: 26 Jul 2024\n", "smollm3": "Date: 26 July 2024\n"}[name] in text
    today = datetime.now().strftime("%Y")
    stock = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What?"}], tokenize=False, add_generation_prompt=True
    )
    assert f" {today}\n" in stock  # which is why it is settled
    assert f" {today}\n" not in text


def test_a_date_in_an_unknown_format_is_refused(tokenizers):
    tokenizer = copy.deepcopy(tokenizers("llama3"))
    tokenizer.chat_template = "{% set f = '%d' %}{{ strftime_now(f) }}{{ messages[0].content }}"
    with pytest.raises(ConfigError, match=r"today's date in a format.*expected a fixed.*prompt: v"):
        render_question(conversation("What?"), tokenizer, "chat_template")


@pytest.mark.parametrize("name", [*FAST, "chatml"])
def test_an_export_writes_the_text_of_the_training(tokenizers, name):
    tokenizer = tokenizers("qwen3" if name == "chatml" else name)
    if name == "chatml":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = CHATML
    template = chat_template(tokenizer, "chat_template")
    assert settled(template) == template  # an export of an export
    assert template.endswith(tokenizer.chat_template) or name in ("llama3", "smollm3")
    turns = ["<image>\nWhat?", "<think>\nhm\n</think>\n\nA bus.", "And?"]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": turns[1]}]},
        {"role": "user", "content": "And?"},
    ]
    (text,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )
    assert text == render_question(conversation(*turns), tokenizer, "chat_template").text
    if name in ("qwen3", "smollm3"):  # whoever asks for thoughts gets the template's own
        (text,), _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=True,
            enable_thinking=True,
            **tokenizer.special_tokens_map,
        )
        assert text.endswith("<|im_start|>assistant\n")


def test_turns_that_a_template_refuses_are_an_error(tokenizers):
    two = Conversation("c", (), (("human", "a"), ("human", "b")))
    with pytest.raises(ConfigError, match=r"template fails: TemplateError Conversation roles must"):
        render_question(two, tokenizers("gemma3"), "chat_template")


def test_an_answer_with_thoughts_is_refused_where_they_are_switched_off(tokenizers):
    turns = ["What?", "<think>\nhm\n</think>\n\nA bus."]
    with pytest.raises(ConfigError, match=r"differently.*Thoughts are off.*prompt: v1"):
        tokenize(turns, tokenizers("qwen3"))


def test_the_answer_to_no_question_is_learned_too(tokenizers):
    greeting = Conversation("c", (), (("gpt", "Hi."), ("human", "What?"), ("gpt", "A bus.")))
    tokenizer = tokenizers("llama3")
    found = tokenize_conversation(
        greeting, tokenizer, prompt="chat_template", num_image_tokens=1, recipe="revised"
    )
    assert learned(found, tokenizer) == ["Hi.<|eot_id|>", "A bus.<|eot_id|>"]


def test_of_several_templates_the_default_is_taken(tokenizers):
    tokenizer = copy.deepcopy(tokenizers("qwen3"))
    tokenizer.chat_template = CHATML
    expected = tokenize(["What?", "A bus."], tokenizer)
    tokenizer.chat_template = {"tool_use": "tools", "default": CHATML}
    assert tokenize(["What?", "A bus."], tokenizer) == expected
    tokenizer.chat_template = {"tool_use": "tools"}
    with pytest.raises(ConfigError, match=r"the tokenizer brings none; use prompt: v1"):
        tokenize(["What?", "A bus."], tokenizer)


REAL = {
    "smollm2": write_smollm2,
    "mistral": lambda folder: write_mistral(folder, False, chat_template=INST),
}


@pytest.mark.parametrize("name", list(REAL))
def test_real_tokenizers_give_the_tokens_and_labels_of_stock_transformers(name, tmp_path):
    folder = REAL[name](tmp_path / name)
    tokenizer, stock = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    marked = stock.chat_template
    if name == "smollm2":
        turn = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
        assert marked.count(turn) == 1
        marked = marked.replace(
            f"{{{{{turn}}}}}",
            "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
            "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
        )
    for turns in (
        ["How many fish are there?", "2"],
        ["What is on the mat?", "A cat. (猫)", "And\n\nbelow it?", "The floor,\nI think."],
        ["a", "b", "c", "d", "e", "1990 10%"],  # one blank: stock reads runs of them otherwise
    ):
        messages = [
            {"role": ("user", "assistant")[at % 2], "content": t} for at, t in enumerate(turns)
        ]
        expected = stock.apply_chat_template(
            messages,
            chat_template=marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for template in (marked, unmarked(marked), stock.chat_template):
            tokenizer.chat_template = template
            found = tokenize(turns, tokenizer)
            size = len(found.input_ids)
            assert found.input_ids == expected["input_ids"][:size]
            mask = [int(label != IGNORED) for label in found.labels]
            assert mask == expected["assistant_masks"][:size]
            assert not any(expected["assistant_masks"][size:])
