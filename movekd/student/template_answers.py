"""Find the answers in the text that a chat template makes of a conversation.

Input: messages and their whole text. Output: the ranges of characters that a model must generate:
each answer and the token that ends it. Used by ``prompts``.

Most templates write a conversation as the question, then what the answer adds. Some write earlier
turns differently when later ones follow: Qwen3 puts an empty block of thoughts only before the last
answer. There, an earlier answer is found by rendering the conversation with another one in its
place: what stays the same is not the answer.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from movekd.errors import ConfigError
from movekd.student.chat_template import Message, marked_ranges, render_messages

Range = tuple[int, int]

_OTHER = "another-answer-7f3a9c1e"
"""Stands in place of an answer; no template trims, splits or quotes it."""


def find_answers(tokenizer: Any, messages: Sequence[Message], text: str) -> list[Range]:
    """Return the ranges of the answers in the text of a conversation, in order.

    They are what the template marks for generation, or else what each assistant's turn adds to the
    text. The last one starts where a question ends, so that the model learns all that it must
    generate. Earlier ones never hold the role that a template writes before the answer.

    Args:
        tokenizer: its template has made ``text``.
        messages: the conversation.
        text: all of its text.

    Raises:
        ConfigError: an answer cannot be told apart, or the template fails.
    """
    turns = [
        _turn(tokenizer, messages, position, text)
        for position, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if not turns:
        return []
    marked = marked_ranges(tokenizer, messages)
    found = [turn for turn in turns if turn is not None]
    if turns[-1] is None or (marked is None and None in turns):
        raise ConfigError(
            "the tokenizer's chat template writes earlier turns differently when the answer "
            "follows, so what the model must say cannot be told. Thoughts are off: an answer may "
            "hold none. Take them out, use student.prompt: v1, or a template in which an answer "
            "follows its question."
        )
    if marked is not None:
        found = _within_marks(found, marked, text)
    return [(start, _answer_end(text, end, tokenizer)) for start, end in found]


def special_tokens(tokenizer: Any) -> set[str]:
    """Return every special token of a tokenizer, also those that have no name in its config.

    Gemma's ``<end_of_turn>`` is such a token.
    """
    return {*tokenizer.all_special_tokens, *_special_added(tokenizer, len(tokenizer))}


@lru_cache(maxsize=8)
def _special_added(tokenizer: Any, num_tokens: int) -> frozenset[str]:
    """Return the added tokens that are special; Gemma has thousands to look through.

    ``num_tokens`` makes a tokenizer with new tokens another key.
    """
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(token.content for token in added if token.special)


def _turn(tokenizer: Any, messages: Sequence[Message], position: int, text: str) -> Range | None:
    """Return the range of an assistant's turn behind what a model is given before it answers.

    None if it cannot be told apart; the last answer must follow the question that is asked.
    """
    is_end = position == len(messages) - 1
    if position > 0:
        question = render_messages(tokenizer, messages[:position], add_generation_prompt=True)
        turn = text if is_end else render_messages(tokenizer, messages[: position + 1])
        if text.startswith(turn) and turn.startswith(question):
            return len(question), len(turn)
        if is_end:
            return None
    return _find_by_exchange(tokenizer, messages, position, text)


def _find_by_exchange(
    tokenizer: Any, messages: Sequence[Message], position: int, text: str
) -> Range | None:
    """Return the range of an answer and its end token; None if more than the answer changes.

    Blanks before the answer belong to it: tokenizers join them with its first word.
    """
    other = [*messages[:position], messages[position] | {"content": _OTHER}]
    changed = render_messages(tokenizer, [*other, *messages[position + 1 :]])
    before, found, after = changed.partition(_OTHER)
    end = len(text) - len(after)
    is_same = text.startswith(before) and text.endswith(after) and len(before) <= end
    if not found or not is_same or _OTHER in after:
        return None
    tokens = sorted(map(re.escape, special_tokens(tokenizer)), key=len, reverse=True)
    end_token = re.compile(rf"\s*({'|'.join(tokens)})").match(text, end) if tokens else None
    return len(before.rstrip(" ")), end if end_token is None else end_token.end()


def _within_marks(turns: list[Range], marked: list[Range], text: str) -> list[Range]:
    """Return the marked ranges, without roles that stand before the answer inside of a mark.

    SmolLM3 marks its turns with their roles. The last answer starts where its question ends.
    """
    *earlier, (start, end) = turns
    found = []
    for low, high in marked:
        if high > start:
            continue
        heads = [at for at, _ in earlier if low < at < high and text[low:at].strip()]
        found.append((min(heads, default=low), high))
    return [*found, (start, max([high for _, high in marked if high > start], default=end))]


def _answer_end(text: str, end: int, tokenizer: Any) -> int:
    """Return the end of a turn without the line break that templates write behind its end token.

    Generation stops at that token, so what follows it is never the model's to say.
    """
    stripped = text[:end].rstrip()
    return len(stripped) if stripped.endswith(tuple(special_tokens(tokenizer))) else end
