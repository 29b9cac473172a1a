"""Tests of movekd.student.tokenization: which tokens are there, and which are learned."""

import copy
from itertools import product
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import scenes
from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.student import load_tokenizer, tokenization
from movekd.student.prompts import V1_SYSTEM
from movekd.student.tokenization import IGNORED, tokenize_conversation
from movekd.student.tokenizer import IMAGE_TOKEN
from text_kit import CHATML, INST, SPACED, byte_bpe, unmarked, write_mistral


def tokenize(conversation, tokenizer, prompt, num_image_tokens, max_length=None):
    return tokenize_conversation(
        conversation,
        tokenizer,
        prompt=prompt,
        num_image_tokens=num_image_tokens,
        recipe="revised",
        model_max_length=max_length,
    )


def tokenize_question(conversation, tokenizer, prompt, num_image_tokens):
    return tokenization.tokenize_question(
        conversation, tokenizer, prompt=prompt, num_image_tokens=num_image_tokens
    )


DIGITS = Path(scenes.__file__).parent / "weights/language_model"
ROLES = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
)
MARKED = (
    ROLES + "{% else %}ASSISTANT: {% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def digits():
    return AutoTokenizer.from_pretrained(DIGITS)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level tokenizer without merges: a token a byte, blanks included."""
    specials = ["<s>", "</s>", IMAGE_TOKEN]
    vocabulary = {
        token: number
        for number, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN],
    )


TWO_TURNS = Conversation(
    "two",
    ("a.png",),
    (
        ("human", "Is there a 3?\n<image>"),
        ("gpt", "yes"),
        ("human", "What is the sum?"),
        ("gpt", "7 , 3"),
    ),
)
CAPTION = Conversation("caption", ("a.png",), (("human", "<image>"), ("gpt", "a 7 at the top.")))


def other_end(byte_level):
    """Return the tokenizer with ends of turns as in ChatML, which knows no ``</s>``."""
    vocabulary = {"<|im_end|>" if w == "</s>" else w: n for w, n in byte_level.get_vocab().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=[IMAGE_TOKEN],
    )


def split(tokenizer, tokenized):
    """Return the tokens in words, and those that have a label."""
    ids, labels = tokenized.input_ids, tokenized.labels
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    words = tokenizer.convert_ids_to_tokens(ids)
    return words, [word for word, label in zip(words, labels, strict=True) if label != IGNORED]


def test_plain_is_images_then_caption(digits, byte_level):
    words, answer = split(digits, tokenize(CAPTION, digits, "plain", 3))
    assert words == ["<s>", *[IMAGE_TOKEN] * 3, *["a", "7", "at", "the", "top", "."]]
    assert answer == ["a", "7", "at", "the", "top", "."]
    tokenized = tokenize(CAPTION, byte_level, "plain", 2)
    assert tokenized.labels[:3] == [IGNORED] * 3
    assert byte_level.decode(tokenized.labels[3:]) == "a 7 at the top.\n"


def test_v1_takes_the_loss_on_answers_and_their_ends(digits):
    words, answer = split(digits, tokenize(TWO_TURNS, digits, "v1", 2))
    after_system = words[len(digits(V1_SYSTEM)["input_ids"]) :]
    assert after_system == [
        *["USER:", IMAGE_TOKEN, IMAGE_TOKEN, "is", "there", "a", "3", "?"],
        *["ASSISTANT:", "yes", "</s>"],
        *["USER:", "what", "is", "the", "sum", "?"],
        *["ASSISTANT:", "7", ",", "3", "</s>"],
    ]
    assert answer == ["yes", "</s>", "7", ",", "3", "</s>"]


def test_v1_ends_answers_with_the_token_that_ends_the_generation(byte_level):
    tokenizer = other_end(byte_level)
    tokenized = tokenize(TWO_TURNS, tokenizer, "v1", 1)
    assert tokenizer.decode(tokenized.input_ids) == (
        f"{V1_SYSTEM} USER: <image>\nIs there a 3? ASSISTANT: yes<|im_end|>"
        "USER: What is the sum? ASSISTANT: 7 , 3<|im_end|>"
    )
    labelled = [label for label in tokenized.labels if label != IGNORED]
    assert tokenizer.decode(labelled) == " yes<|im_end|> 7 , 3<|im_end|>"
    assert labelled.count(tokenizer.eos_token_id) == 2
    question = Conversation("q", ("a.png",), TWO_TURNS.turns[:3])
    ids = tokenize_question(question, tokenizer, "v1", 1)
    assert tokenizer.decode(ids).endswith("yes<|im_end|>USER: What is the sum? ASSISTANT:")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"no eos_token for the end of an answer; name one"):
        tokenize(TWO_TURNS, tokenizer, "v1", 1)


def test_v1_to_the_byte(byte_level):
    tokenized = tokenize(TWO_TURNS, byte_level, "v1", 1)
    assert byte_level.decode(tokenized.input_ids) == (
        f"<s>{V1_SYSTEM} USER: <image>\nIs there a 3? ASSISTANT: yes</s>"
        "USER: What is the sum? ASSISTANT: 7 , 3</s>"
    )
    labelled = [label for label in tokenized.labels if label != IGNORED]
    assert byte_level.decode(labelled) == " yes</s> 7 , 3</s>"


@pytest.mark.parametrize("name", ["digits", "byte_level"])
def test_templates_with_and_without_marks_agree(name, request):
    tokenizer = request.getfixturevalue(name)
    results = []
    for template in (MARKED, UNMARKED):
        tokenizer.chat_template = template
        results.append(tokenize(TWO_TURNS, tokenizer, "chat_template", 2))
    assert results[0] == results[1]
    labelled = [label for label in results[0].labels if label != IGNORED]
    assert labelled == tokenizer("yes</s>7 , 3</s>", add_special_tokens=False)["input_ids"]
    assert results[0].input_ids.count(tokenizer.bos_token_id) == 1


def test_a_template_whose_prefix_changes_is_refused(digits):
    digits.chat_template = (
        "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"writes earlier turns differently.*prompt: v1"):
        tokenize(TWO_TURNS, digits, "chat_template", 2)


def test_a_tokenizer_without_a_template_says_so(byte_level):
    byte_level.chat_template = None
    with pytest.raises(ConfigError, match=r"the tokenizer brings none; use prompt: v1"):
        tokenize(TWO_TURNS, byte_level, "chat_template", 2)


ANSWERS = [
    *("2", "0", "1990", "12:30", "50%", "½", "猫", "猫が", "A cat.", "cat", " blank", "  two"),
    *("\nnewline", "\n\nmore", "\ttab", '"q"', "'s", "(B) pear", "[1]", "...", "-", "🐱", "é"),
    *("A\u00a0b", "x</s>y", "ASSISTANT: hi", "10 ", "a\n", "x<unk>"),
]
BEFORE = [None, "Yes.", "\nodd", "2"]
"""The model's turn before, if there is one."""

KINDS = {
    "sentencepiece": [INST, unmarked(INST), SPACED, unmarked(SPACED)],
    "sentencepiece_legacy": [INST, unmarked(INST), SPACED, unmarked(SPACED)],
    "bpe": [CHATML, unmarked(CHATML)],
    "byte_level": [MARKED, UNMARKED],
    "digits": [MARKED, UNMARKED],
}
"""Kind of tokenizer -> its chat templates."""


@pytest.fixture(scope="module")
def kinds(byte_level, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    byte_bpe().save_pretrained(folder / "bpe")
    write_mistral(folder / "sentencepiece", False)
    write_mistral(folder / "sentencepiece_legacy", None)
    loaded = {path.name: load_tokenizer(path) for path in folder.iterdir()}
    return loaded | {"byte_level": byte_level, "digits": digits}


@pytest.mark.parametrize("recipe", ["official", "revised"])
@pytest.mark.parametrize(
    ("kind", "prompt", "template"),
    [
        (kind, prompt, template)
        for kind, templates in KINDS.items()
        for prompt, template in [
            ("v1", None),
            ("plain", None),
            *[("chat_template", t) for t in templates],
        ]
    ],
)
def test_question_and_labels_are_all_tokens(kinds, kind, prompt, template, recipe):
    """What a model is asked with, and what it has learned to say, leave no token between them."""
    tokenizer = copy.deepcopy(kinds[kind])
    if template is not None:
        tokenizer.chat_template = template
    num_compared = 0
    for answer, before in product(ANSWERS, BEFORE if prompt != "plain" else [None]):
        asked = (("human", "How many?\n<image>"),)
        if before is not None:
            asked += (("gpt", before), ("human", "And now?"))
        question = tokenize_question(Conversation("c", ("a",), asked), tokenizer, prompt, 3)
        whole = tokenize_conversation(
            Conversation("c", ("a",), (*asked, ("gpt", answer))),
            tokenizer,
            prompt=prompt,
            num_image_tokens=3,
            recipe=recipe,
        )
        if set(whole.labels) == {IGNORED}:
            assert recipe == "official"
            continue
        num_compared += 1
        assert whole.input_ids[: len(question)] == question
        assert whole.labels[len(question) :] == whole.input_ids[len(question) :], (before, answer)
    assert num_compared >= (20 if prompt == "plain" else 100)


@pytest.mark.parametrize("kind", list(KINDS))
def test_earlier_answers_are_learned_and_questions_are_not(kinds, kind):
    """Labels, decoded, are the answers, whichever prompt wrote them."""
    tokenizer = copy.deepcopy(kinds[kind])
    said = ["yes", "7"] if kind == "digits" else ["2", "猫 (B)"]
    turns = (("human", "<image>\nis there"), ("gpt", said[0]), ("human", "and"), ("gpt", said[1]))
    for prompt, template in [("v1", None), *[("chat_template", t) for t in KINDS[kind]]]:
        if template is not None:
            tokenizer.chat_template = template
        found = tokenize(Conversation("c", ("a",), turns), tokenizer, prompt, 1)
        labelled = [label for label in found.labels if label != IGNORED]
        text = tokenizer.decode(labelled).replace(" ", "").replace("\n", "")
        assert text == "".join(f"{a}{tokenizer.eos_token}" for a in said).replace(" ", "")


def test_a_greeting_before_the_first_question_is_dropped(kinds):
    turns = (("gpt", "Welcome!"), ("human", "<image>\nWhat?"), ("gpt", "A cat."))
    with_it, without = (
        tokenize(Conversation("c", ("a",), t), kinds["sentencepiece"], "v1", 2)
        for t in (turns, turns[1:])
    )
    assert with_it == without


def test_nothing_is_learned_from_an_empty_answer(kinds):
    silent = Conversation("c", ("a",), (("human", "<image>\nWhat?"), ("gpt", "")))
    for kind in KINDS:
        assert set(tokenize(silent, kinds[kind], "v1", 2).labels) == {IGNORED}


def test_a_tokenizer_that_joins_question_and_answer_is_refused(digits):
    """A word-level tokenizer of whole lines: no part of a line is a token."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "ask 2</s>": 2}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if not add_generation_prompt %}.{% endif %}",
    )
    joined = Conversation("c", (), (("human", "ask "), ("gpt", "2")))
    with pytest.raises(ConfigError, match=r"joins the answer '2.'.* cannot be learned; use stud"):
        tokenize(joined, tokenizer, "chat_template", 1)


def test_a_plain_question_is_the_image_alone(digits):
    question = tokenize_question(
        Conversation("q", ("a.png",), CAPTION.turns[:1]), digits, "plain", 3
    )
    assert digits.convert_ids_to_tokens(question) == ["<s>", *[IMAGE_TOKEN] * 3]


@pytest.mark.parametrize("count", [1, 36])
def test_each_image_becomes_its_tokens(digits, count):
    several = Conversation(
        "several", ("a", "b"), (("human", "<image> is <image> a 3?"), ("gpt", "no"))
    )
    image = digits.convert_tokens_to_ids(IMAGE_TOKEN)
    for prompt in ("plain", "v1"):
        ids = tokenize(several, digits, prompt, count).input_ids
        assert ids.count(image) == 2 * count


def test_text_only_conversations_have_no_image_token(digits):
    text = Conversation("text", (), (("human", "Is there a 3?"), ("gpt", "no")))
    _, answer = split(digits, tokenize(text, digits, "v1", 4))
    assert answer == ["no", "</s>"]
    assert IMAGE_TOKEN not in digits.convert_ids_to_tokens(
        tokenize(text, digits, "v1", 4).input_ids
    )


def test_a_cut_drops_the_end_but_never_an_image(digits):
    whole = tokenize(CAPTION, digits, "plain", 3)
    cut = tokenize(CAPTION, digits, "plain", 3, max_length=6)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:6], whole.labels[:6])
    assert tokenize(CAPTION, digits, "plain", 3, max_length=len(whole.labels)) == whole
    with pytest.raises(ConfigError, match=r"'caption' has 10 tokens.*max_length 3 would cut an im"):
        tokenize(CAPTION, digits, "plain", 3, max_length=3)


@pytest.mark.parametrize("text", ["What?", "<image><image> What?"])
def test_images_and_placeholders_must_agree(digits, text):
    wrong = Conversation("odd", ("a.png",), (("human", text), ("gpt", "7")))
    with pytest.raises(ConfigError, match=rf"'odd' has {text.count('<image>')} <image>.* 1 images"):
        tokenize(wrong, digits, "v1", 4)
    with pytest.raises(ConfigError, match=r"'odd'"):
        tokenize_question(wrong, digits, "v1", 4)


def test_plain_needs_a_caption(digits):
    silent = Conversation("silent", ("a.png",), (("human", "<image>"),))
    with pytest.raises(ConfigError, match=r"'silent' has no 'gpt' turn"):
        tokenize(silent, digits, "plain", 4)
