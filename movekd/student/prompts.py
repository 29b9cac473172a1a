"""Conversations as tokens and labels, in LLaVA's prompt formats.

The text is tokenised whole (pieces tokenised one by one come out otherwise at their seams); which
tokens are the answer is read off the character offsets. Each ``<image>`` becomes as many image
tokens as the projector gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError
from movekd.student.config import PromptFormat

IMAGE_TOKEN = "<image>"
IGNORED = -100
"""Label of a token that the loss leaves out."""
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Vicuna's system prompt, as LLaVA-1.5 was trained with it."""


@dataclass(frozen=True)
class TokenizedConversation:
    """One conversation, ready for a model: ``input_ids`` and ``labels`` are of one length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class _Text:
    """A rendered conversation and the character ranges that the loss is taken on."""

    text: str
    answers: list[tuple[int, int]]
    has_special_tokens: bool


def tokenize(
    conversation: Conversation,
    tokenizer: Any,
    prompt: PromptFormat,
    num_image_tokens: int | Sequence[int],
    max_length: int | None = None,
) -> TokenizedConversation:
    """Return tokens and labels of a conversation; only the answers have labels.

    Args:
        conversation: turns of "human" and "gpt".
        tokenizer: a fast tokenizer that knows ``<image>`` as one token.
        prompt: the format.
        num_image_tokens: tokens an image; one number for all, or one for each.
        max_length: longer samples are cut at the end.

    Raises:
        ConfigError: the text has not as many ``<image>`` as images, the cut would go through an
            image, or the template cannot be used.
    """
    if prompt == "chat_template" and _marks_answers(tokenizer):
        tokens, is_answer = _tokenize_marked(conversation, tokenizer)
    else:
        tokens, is_answer = _tokenize_rendered(_render(conversation, tokenizer, prompt), tokenizer)
    image_id = _require_images(conversation, tokens, tokenizer)
    input_ids: list[int] = []
    labels: list[int] = []
    numbers = _copies(tokens, image_id, num_image_tokens)
    for token, answers, copies in zip(tokens, is_answer, numbers, strict=True):
        input_ids += [token] * copies
        labels += [token if answers and token != image_id else IGNORED] * copies
    if max_length is not None and len(input_ids) > max_length:
        if image_id in input_ids[max_length:]:
            raise ConfigError(
                f"conversation '{conversation.id}' has {len(input_ids)} tokens, and cutting it at "
                f"data.model_max_length {max_length} would cut an image; raise the limit."
            )
        input_ids, labels = input_ids[:max_length], labels[:max_length]
    return TokenizedConversation(input_ids, labels)


def check_conversation(conversation: Conversation, prompt: PromptFormat) -> None:
    """Find without a tokenizer what ``tokenize`` would refuse; fast enough for a whole corpus.

    Raises:
        ConfigError: there is no answer to learn, or not an ``<image>`` for each image.
    """
    if not any(role == "gpt" for role, _ in conversation.turns):
        raise ConfigError(
            f"conversation '{conversation.id}' has no 'gpt' turn; expected the answer to learn "
            "there. Take it out, or give it one."
        )
    if prompt != "plain":  # which puts the images in front of the caption itself
        _require_count(conversation, sum(text.count(IMAGE_TOKEN) for _, text in conversation.turns))


def tokenize_question(
    conversation: Conversation,
    tokenizer: Any,
    prompt: PromptFormat,
    num_image_tokens: int | Sequence[int],
) -> list[int]:
    """Return the tokens up to where the model must answer: the last human turn, then its cue.

    Raises:
        ConfigError: as ``tokenize``.
    """
    if prompt == "plain":
        rendered = _Text(IMAGE_TOKEN * len(conversation.images), [], False)
    elif prompt == "v1":
        rendered = _render_v1(conversation, tokenizer)
        rendered = _Text(rendered.text + "ASSISTANT:", [], False)
    else:
        text = _apply_template(tokenizer, _messages(conversation), add_generation_prompt=True)
        rendered = _Text(text, [], True)
    ids = tokenizer(rendered.text, add_special_tokens=not rendered.has_special_tokens)["input_ids"]
    image_id = _require_images(conversation, ids, tokenizer)
    expanded: list[int] = []
    for token, copies in zip(ids, _copies(ids, image_id, num_image_tokens), strict=True):
        expanded += [token] * copies
    return expanded


def _copies(
    tokens: Sequence[int], image_id: int, num_image_tokens: int | Sequence[int]
) -> list[int]:
    """Return how often each token goes into the prompt: an image's as often as it has features."""
    copies = [1] * len(tokens)
    places = [place for place, token in enumerate(tokens) if token == image_id]
    if isinstance(num_image_tokens, int):
        num_image_tokens = [num_image_tokens] * len(places)
    for place, number in zip(places, num_image_tokens, strict=True):
        copies[place] = number
    return copies


def _require_images(conversation: Conversation, tokens: list[int], tokenizer: Any) -> int:
    """Return the id of ``<image>`` after checking that there is one for each image.

    Raises:
        ConfigError: there are more or fewer.
    """
    image_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    _require_count(conversation, tokens.count(image_id))
    return image_id


def _require_count(conversation: Conversation, found: int) -> None:
    if found != len(conversation.images):
        raise ConfigError(
            f"conversation '{conversation.id}' has {found} {IMAGE_TOKEN} in its text and "
            f"{len(conversation.images)} images; expected one each. `movekd shards pack` writes a "
            "conversations.jsonl in which they agree."
        )


def _marks_answers(tokenizer: Any) -> bool:
    """Return whether the chat template itself says which part is the assistant's."""
    return "{% generation" in (tokenizer.chat_template or "")


def _tokenize_marked(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenise with a template that has ``{% generation %}`` marks: one rendering, no search."""
    encoded = tokenizer.apply_chat_template(
        _messages(conversation),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return encoded["input_ids"], [bool(mask) for mask in encoded["assistant_masks"]]


def _tokenize_rendered(rendered: "_Text", tokenizer: Any) -> tuple[list[int], list[bool]]:
    encoded = tokenizer(
        rendered.text,
        add_special_tokens=not rendered.has_special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    is_answer = [
        end > start and any(start < high and end > low for low, high in rendered.answers)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], is_answer


def _render(conversation: Conversation, tokenizer: Any, prompt: PromptFormat) -> _Text:
    if prompt == "plain":
        return _render_plain(conversation)
    if prompt == "v1":
        return _render_v1(conversation, tokenizer)
    return _render_template(conversation, tokenizer)


def _render_plain(conversation: Conversation) -> _Text:
    """The image, then the caption and a line break.

    Source: haotian-liu/LLaVA llava/train/train.py, preprocess_plain.
    """
    images = IMAGE_TOKEN * len(conversation.images)
    check_conversation(conversation, "plain")
    caption = next(text for role, text in conversation.turns if role == "gpt")
    text = images + caption + "\n"
    return _Text(text, [(len(images), len(text))], False)


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


def _render_v1(conversation: Conversation, tokenizer: Any) -> _Text:
    """Vicuna's chat.

    Source: haotian-liu/LLaVA llava/conversation.py, conv_vicuna_v1; llava/train/train.py,
    preprocess_multimodal (the image goes to the front of its turn) and preprocess_v1.
    """
    text, answers, end = V1_SYSTEM + " ", [], turn_end(tokenizer)
    for role, turn in conversation.turns:
        if role == "human":
            text += f"USER: {_image_first(turn)} "
            continue
        text += "ASSISTANT: "
        start = len(text)
        text += f"{turn}{end}"
        answers.append((start, len(text)))
    return _Text(text, answers, False)


def _render_template(conversation: Conversation, tokenizer: Any) -> _Text:
    """Whatever chat template the tokenizer brings; an answer ends where its turn does."""
    messages = _messages(conversation)
    text = _apply_template(tokenizer, messages)
    answers = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        cue = _apply_template(tokenizer, messages[:position], add_generation_prompt=True)
        turn = _apply_template(tokenizer, messages[: position + 1])
        if not text.startswith(turn) or not turn.startswith(cue):
            raise ConfigError(
                "the tokenizer's chat template writes earlier turns differently when later ones "
                "follow, so the answers cannot be told apart; use student.prompt: v1, or a "
                "template whose prefix is stable."
            )
        answers.append((len(cue), len(turn)))
    return _Text(text, answers, True)


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {"role": roles[role], "content": _image_first(text)} for role, text in conversation.turns
    ]


def _apply_template(
    tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "student.prompt is chat_template, but the tokenizer brings none; use prompt: v1, or "
            "a tokenizer with a chat template."
        )
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def _image_first(turn: str) -> str:
    """Return the turn with its one image in front, on a line of its own; several stay in place."""
    if turn.count(IMAGE_TOKEN) != 1:
        return turn
    return f"{IMAGE_TOKEN}\n{turn.replace(IMAGE_TOKEN, '').strip()}".strip()
