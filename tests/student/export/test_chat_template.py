"""Tests of movekd.student.export.chat_template: messages become the text of the training."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from movekd.corpus.conversations import Conversation
from movekd.student.export.chat_template import chat_template
from movekd.student.prompts import render_question

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "starts with lines": (
        "\n\n  {% for m in messages %}\n  [{{ m.role }}] {{ m.content }}\n{% endfor %}"
    ),
    "starts with text": "  <s>{%- for m in messages -%} {{ m['content'] }} {%- endfor -%}  ",
    "sets messages": (
        "{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set first = '' %}{%- endif %}\n"
        "{{- first }}{%- for message in messages %}"
        "{{- message.role ~ ': ' ~ message.content | trim }}\n{%- endfor %}"
    ),
    "marks answers": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ 'Q: ' + m.content }}{% endif %}{% endfor %}"
    ),
}
TEXT = st.text(st.sampled_from("ab.?'\" \n\t{}%é猫"), max_size=12)
TURN = st.tuples(st.integers(0, 2), TEXT)


def tokenizer(template):
    """What the functions read of a tokenizer, with transformers' own rendering."""

    def apply(messages, chat_template, tokenize, add_generation_prompt):
        assert not tokenize
        return render(chat_template, messages, add_generation_prompt)

    return SimpleNamespace(
        chat_template=template, apply_chat_template=apply, eos_token="</s>", special_tokens_map={}
    )


def render(template, messages, add_generation_prompt=True):
    texts, _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
    )
    return texts[0]


@pytest.mark.parametrize("name", [*TEMPLATES, "v1"])
@settings(derandomize=True, max_examples=25, deadline=None)
@given(turns=st.lists(TURN, min_size=1, max_size=4).filter(lambda turns: len(turns) % 2 == 1))
def test_messages_with_images_become_the_text_of_the_training(name, turns):
    base = tokenizer(TEMPLATES.get(name))
    prompt = "v1" if name == "v1" else "chat_template"
    template = chat_template(base, prompt)
    conversation, messages, plain = [], [], []
    for number, (num_images, words) in enumerate(turns):
        is_human = number % 2 == 0
        num_images = num_images if is_human else 0
        text = "<image>\n" * num_images + words
        role = "user" if is_human else "assistant"
        conversation.append(("human" if is_human else "gpt", text))
        parts = [{"type": "image"}] * num_images + [{"type": "text", "text": words}]
        messages.append({"role": role, "content": parts})
        plain.append({"role": role, "content": text})
    images = ("image",) * sum(text.count("<image>") for _, text in conversation)
    expected = render_question(Conversation("c", images, tuple(conversation)), base, prompt).text
    assert render(template, messages) == expected
    assert render(template, plain) == expected
    again = chat_template(tokenizer(template), prompt)
    assert again == template  # an export of an export


def test_a_part_or_a_role_that_the_model_cannot_read_is_refused():
    template = chat_template(tokenizer(CHATML), "chat_template")
    with pytest.raises(TemplateError, match="only parts of type image and text"):
        render(template, [{"role": "user", "content": [{"type": "video"}]}])
    template = chat_template(tokenizer(None), "v1")
    with pytest.raises(TemplateError, match="only the roles"):
        render(template, [{"role": "tool", "content": "x"}])
    system = render(template, [{"role": "system", "content": "Be brief."}, *QUESTION])
    assert system == "Be brief. USER: What? ASSISTANT:"


QUESTION = [{"role": "user", "content": "What?"}]
