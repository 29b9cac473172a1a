"""Render conversations as text, and find the answers in it.

Input: a conversation and a prompt format. Output: the text with one ``<image>`` per image, and
the ranges of characters that a model must generate. ``tokenization`` makes tokens and labels of it.
"""

from dataclasses import dataclass
from typing import Any

from movekd.corpus.conversations import Conversation, Role
from movekd.errors import ConfigError
from movekd.student.chat_template import Message, render_messages
from movekd.student.config import PromptFormat
from movekd.student.template_answers import find_answers
from movekd.student.tokenizer import IMAGE_TOKEN

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Vicuna's system prompt, as LLaVA-1.5 was trained with it."""

_V1_ROLES: dict[Role, str] = {"human": "USER:", "gpt": "ASSISTANT:"}
_TEMPLATE_ROLES: dict[Role, str] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Prompt:
    """A conversation as text.

    Attributes:
        text: what is tokenised.
        answers: start and end of what the model must generate, in characters, per answer. What a
            model is given before it answers ends at the start.
        has_special_tokens: the text holds its own ``<s>``, as chat templates write it.
    """

    text: str
    answers: list[tuple[int, int]]
    has_special_tokens: bool = False


def render_conversation(conversation: Conversation, tokenizer: Any, prompt: PromptFormat) -> Prompt:
    """Return the text of a conversation and where its answers are.

    Raises:
        ConfigError: no turn is an answer, or the prompt cannot be made with this tokenizer.
    """
    if prompt == "plain":
        return _render_plain(conversation)
    if prompt == "v1":
        return _render_v1(conversation, tokenizer)
    return _render_template(conversation, tokenizer)


def render_question(conversation: Conversation, tokenizer: Any, prompt: PromptFormat) -> Prompt:
    """Return the text up to where the model must answer the last human turn.

    Raises:
        ConfigError: as ``render_conversation``.
    """
    if prompt == "plain":
        return Prompt(IMAGE_TOKEN * len(conversation.images), [])
    if prompt == "v1":
        return Prompt(_render_v1(conversation, tokenizer).text + _V1_ROLES["gpt"], [])
    text = render_messages(tokenizer, _messages(conversation), add_generation_prompt=True)
    return Prompt(text, [], True)


def check_conversation(conversation: Conversation, prompt: PromptFormat) -> None:
    """Refuse what cannot be tokenised, without a tokenizer; fast enough for a whole corpus.

    Raises:
        ConfigError: no turn is an answer, or the text has not one ``<image>`` per image.
    """
    if not any(role == "gpt" for role, _ in conversation.turns):
        raise ConfigError(
            f"conversation '{conversation.id}' has no 'gpt' turn; expected the answer to learn "
            "there. Take it out, or give it one."
        )
    if prompt != "plain":  # which puts the images in front of the caption itself
        count = sum(text.count(IMAGE_TOKEN) for _, text in _without_greeting(conversation))
        require_image_count(conversation, count)


def require_image_count(conversation: Conversation, found: int) -> None:
    """Refuse a conversation that does not name each of its images once.

    Raises:
        ConfigError: names it and says both numbers.
    """
    if found != len(conversation.images):
        raise ConfigError(
            f"conversation '{conversation.id}' has {found} {IMAGE_TOKEN} in its text and "
            f"{len(conversation.images)} images; expected one each. `movekd shards pack` writes a "
            "conversations.jsonl in which they agree."
        )


def turn_end(tokenizer: Any) -> str:
    """Return what ends an answer of Vicuna's chat: ``</s>``, or whatever stops the generation.

    Raises:
        ConfigError: the tokenizer has no token for it.
    """
    if not tokenizer.eos_token:
        raise ConfigError(
            "student.prompt is v1, but the tokenizer has no eos_token for the end of an answer; "
            "name one in its tokenizer_config.json, or use prompt: chat_template."
        )
    return str(tokenizer.eos_token)


def _render_plain(conversation: Conversation) -> Prompt:
    """Render the image, then the caption and a line break.

    Source: haotian-liu/LLaVA llava/train/train.py, preprocess_plain.
    """
    images = IMAGE_TOKEN * len(conversation.images)
    check_conversation(conversation, "plain")
    caption = next(text for role, text in conversation.turns if role == "gpt")
    text = images + caption + "\n"
    return Prompt(text, [(len(images), len(text))])


def _render_v1(conversation: Conversation, tokenizer: Any) -> Prompt:
    """Render Vicuna's chat.

    An answer starts at the colon, so the blank behind it is the model's to generate. An empty turn
    is only its role, as LLaVA writes it: nothing is learned from an empty answer.

    Source: haotian-liu/LLaVA llava/conversation.py, conv_vicuna_v1; llava/train/train.py,
    preprocess_multimodal (the image goes to the front of its turn) and preprocess_v1.
    """
    text, answers = V1_SYSTEM + " ", []
    ends: dict[Role, str] = {"human": " ", "gpt": turn_end(tokenizer)}
    for role, turn in _without_greeting(conversation):
        text += _V1_ROLES[role]
        start = len(text)
        if turn:
            text += f" {_image_first(turn)}{ends[role]}"
        if role == "gpt":
            answers.append((start, len(text)))
    return Prompt(text, answers)


def _without_greeting(conversation: Conversation) -> tuple[tuple[Role, str], ...]:
    """Return the turns from the first human one on: LLaVA drops a model's turn before it."""
    turns = conversation.turns
    return turns[1:] if turns[0][0] == "gpt" and len(turns) > 1 else turns


def _render_template(conversation: Conversation, tokenizer: Any) -> Prompt:
    """Render with the tokenizer's chat template, and find the answers in the text."""
    messages = _messages(conversation)
    text = render_messages(tokenizer, messages)
    return Prompt(text, find_answers(tokenizer, messages, text), True)


def _messages(conversation: Conversation) -> list[Message]:
    return [
        {"role": _TEMPLATE_ROLES[role], "content": _image_first(text)}
        for role, text in conversation.turns
    ]


def _image_first(turn: str) -> str:
    """Return the turn with its image on a line before the text; several images stay in place."""
    if turn.count(IMAGE_TOKEN) != 1:
        return turn
    return f"{IMAGE_TOKEN}\n{turn.replace(IMAGE_TOKEN, '').strip()}".strip()
