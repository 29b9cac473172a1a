"""Render a tokenizer's chat template: the same text on every day, and without thinking.

Input: messages of a conversation. Output: their text, and the ranges that the template marks as
answers. Used by ``prompts`` in training and answering. Exports get the same settled template.

A template is a program in the tokenizer's files, and some read more than the messages: today's date
(Llama 3.2, SmolLM3), or ``enable_thinking``, without which Qwen3 and SmolLM3 think before each
answer. ``settled`` fixes both.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from movekd.errors import ConfigError, shorten

Message = dict[str, str]
"""``role`` (user or assistant) and ``content``."""

PROMPT_DATE = date(2024, 7, 26)
"""The day that templates write as today's: 26 Jul 2024, the default of Llama 3.1's template."""

_NO_THINKING = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}\n"
)
"""Goes in front of a template that knows the variable; callers can still set it. The line break is
not printed (``trim_blocks``)."""
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
_MARK = re.compile(r"\{%-?\s*generation\b")


def template_of(tokenizer: Any) -> str:
    """Return a tokenizer's chat template, settled.

    Raises:
        ConfigError: the tokenizer has none, or it asks for the date in an unknown way.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, as for tools
        template = template.get("default")
    if not template:
        raise ConfigError(
            "student.prompt is chat_template, but the tokenizer brings none; use prompt: v1, or "
            "a tokenizer with a chat template."
        )
    return settled(template)


@lru_cache(maxsize=64)
def settled(template: str) -> str:
    """Return a template whose text depends only on the messages; a settled one is not changed.

    ``strftime_now("%d %b %Y")`` becomes the text of ``PROMPT_DATE``, and ``enable_thinking`` is
    false unless the caller sets it.

    Raises:
        ConfigError: the template makes the format of the date while it runs.
    """
    dated = _TODAY.sub(lambda found: json.dumps(PROMPT_DATE.strftime(found[2])), template)
    if re.search(r"\bstrftime_now\s*\(", dated):
        raise ConfigError(
            "the tokenizer's chat template writes today's date in a format that it makes while it "
            'runs; expected a fixed one like strftime_now("%d %b %Y"), because a prompt must not '
            "change from day to day. Write the date into the template, or use student.prompt: v1."
        )
    knows_thinking = re.search(r"\benable_thinking\b", dated) and _NO_THINKING not in dated
    return _NO_THINKING + dated if knows_thinking else dated


def render_messages(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Return the text of messages, with the cue to answer if asked for.

    Raises:
        ConfigError: the tokenizer has no template, or the template fails.
    """
    template = template_of(tokenizer)
    with _rendering():
        text: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    return text


def marked_ranges(tokenizer: Any, messages: Sequence[Message]) -> list[tuple[int, int]] | None:
    """Return the ranges between a template's generation marks; None if it has no marks.

    Raises:
        ConfigError: as ``render_messages``.
    """
    template = template_of(tokenizer)
    if not _MARK.search(template):
        return None
    with _rendering():
        _, ranges = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return [(start, end) for start, end in ranges[0]]


@contextmanager
def _rendering() -> Iterator[None]:
    """Report what a chat template raises.

    transformers renders it in Jinja's sandbox, which reaches no files and changes no objects.

    Raises:
        ConfigError: the template is no Jinja, or fails.
    """
    try:
        yield
    except Exception as error:  # a template can raise anything
        raise ConfigError(
            f"the tokenizer's chat template fails: {type(error).__name__} {shorten(error)}; "
            "expected a Jinja template that renders human and assistant turns. Mend it, or use "
            "student.prompt: v1."
        ) from None
