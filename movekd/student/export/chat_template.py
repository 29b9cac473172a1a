"""Write the chat template of an exported processor: users' messages become the training's text.

Messages of transformers hold text, or a list of images and texts. The training's prompts
(``prompts``) hold text with ``<image>`` in it. The template here makes the one of the other, and
then renders it as the training did: Vicuna's chat, or the settled template of the tokenizer (see
``student.chat_template``).
"""

import json
from typing import Any

from movekd.student.chat_template import template_of
from movekd.student.config import PromptFormat
from movekd.student.prompts import V1_SYSTEM, turn_end
from movekd.student.tokenizer import IMAGE_TOKEN

_TEXT_ONLY = (
    "{%- set flat = namespace(messages=[]) %}"
    "{%- for message in messages %}"
    "{%- if message['content'] is defined and message['content'] is not none %}"
    "{%- set text = namespace(value='') %}"
    "{%- if message['content'] is string %}{%- set text.value = message['content'] %}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{%- set text.value = text.value + '<image>\n' %}"
    "{%- elif part['type'] == 'text' %}{%- set text.value = text.value + part['text'] %}"
    "{%- else %}{{ raise_exception('the model reads only parts of type image and text') }}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{%- if text.value.split('<image>') | length == 2 %}"
    "{%- set text.value = '<image>\n' + (text.value.replace('<image>', '') | trim) %}"
    "{%- set text.value = text.value | trim %}{%- endif %}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text.value)] %}"
    "{%- else %}{%- set flat.messages = flat.messages + [message] %}{%- endif %}"
    "{%- endfor %}{%- set messages = flat.messages %}\n"
)
"""Joins the parts of each message; the one image of a message stands on the first line. The line
break at the end is not printed (``trim_blocks``): the next template starts on a new line."""

_V1 = (
    "{%- set system = namespace(text=SYSTEM) %}"
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- set system.text = messages[0]['content'] %}{%- set messages = messages[1:] %}{%- endif %}"
    "{{ system.text + ' ' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}"
    "{{ 'USER:' }}{%- if message['content'] %}{{ ' ' + message['content'] + ' ' }}{%- endif %}"
    "{%- elif message['role'] != 'assistant' %}"
    "{{ raise_exception('the model knows only the roles system (first), user and assistant') }}"
    "{%- elif not loop.first or loop.last %}"
    "{{ 'ASSISTANT:' }}"
    "{%- if message['content'] %}{{ ' ' + message['content'] + END }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
)
"""Vicuna's chat, as ``prompts`` writes it: only the role of an empty turn, no greeting before the
first question. END is what ends an answer; a first message of role system replaces SYSTEM."""


def chat_template(tokenizer: Any, prompt: PromptFormat) -> str | None:
    """Return the template of a processor; None for ``plain``, whose prompt is only the image.

    Raises:
        ConfigError: the prompt is v1 and the tokenizer has no token that ends an answer; or the
            template cannot be settled.
    """
    assert IMAGE_TOKEN in _TEXT_ONLY
    if prompt == "v1":
        body = _V1.replace("SYSTEM", json.dumps(V1_SYSTEM))
        return _TEXT_ONLY + body.replace("END", json.dumps(turn_end(tokenizer)))
    if prompt == "plain" or not tokenizer.chat_template:
        return None
    template = template_of(tokenizer)
    return template if _TEXT_ONLY in template else _TEXT_ONLY + template
