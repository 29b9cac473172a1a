"""Turn conversations into tokens and labels, for training and for answering.

Input: a conversation and a tokenizer of ``load_tokenizer``. Output: ``input_ids``, in which each
``<image>`` is as many tokens as the projector gives, and ``labels``. What the model must generate
is labelled, nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from movekd.corpus.conversations import Conversation, parse_conversation
from movekd.errors import ConfigError, shorten
from movekd.student.config import PromptFormat, Recipe
from movekd.student.prompts import (
    Prompt,
    render_conversation,
    render_question,
    require_image_count,
    turn_end,
)
from movekd.student.tokenizer import IMAGE_TOKEN

IGNORED = -100
"""Label of a token that the loss leaves out."""


@dataclass(frozen=True)
class TokenizedConversation:
    """One conversation, ready for a model: ``input_ids`` and ``labels`` are of one length."""

    input_ids: list[int]
    labels: list[int]


def tokenize_conversation(
    conversation: Conversation | Mapping[str, Any],
    tokenizer: Any,
    *,
    prompt: PromptFormat,
    num_image_tokens: int | Sequence[int],
    recipe: Recipe,
    model_max_length: int | None = None,
) -> TokenizedConversation:
    """Return tokens and labels of a conversation as training sees them.

    Args:
        conversation: a conversation, or an entry of LLaVA's JSON.
        tokenizer: what ``load_tokenizer`` returns.
        prompt: the format.
        num_image_tokens: tokens per image; one number for all, or one for each.
        recipe: ``official`` labels what LLaVA labels, so nothing of a sample that it ignores:
            one with ``ASSISTANT:``, ``</s>`` or ``<unk>`` inside a turn.
        model_max_length: longer samples are cut at the end, images expanded.

    Raises:
        ConfigError: the text has not as many ``<image>`` as images, the cut would go through an
            image, or the prompt cannot be made with this tokenizer.
    """
    if not isinstance(conversation, Conversation):
        conversation = parse_conversation(conversation, "the conversation")
    rendered = render_conversation(conversation, tokenizer, prompt)
    tokens, is_answer = _tokenize_answers(rendered, tokenizer)
    if prompt == "chat_template":
        tokens, is_answer = _without_rest(tokens, is_answer, tokenizer)
    if recipe == "official" and prompt == "v1":
        cut_at = model_max_length if not conversation.images else None
        counted = _count_as_llava(rendered.text, tokens, tokenizer, model_max_length, cut_at)
        is_answer = is_answer if counted is None else counted
    image_id = _require_images(conversation, tokens, tokenizer)
    input_ids: list[int] = []
    labels: list[int] = []
    numbers = _copies(tokens, image_id, num_image_tokens)
    for token, answers, copies in zip(tokens, is_answer, numbers, strict=True):
        input_ids += [token] * copies
        labels += [token if answers and token != image_id else IGNORED] * copies
    if model_max_length is not None and len(input_ids) > model_max_length:
        if image_id in input_ids[model_max_length:]:
            raise ConfigError(
                f"conversation '{conversation.id}' has {len(input_ids)} tokens, and cutting it at "
                f"data.model_max_length {model_max_length} would cut an image; raise the limit."
            )
        input_ids, labels = input_ids[:model_max_length], labels[:model_max_length]
    return TokenizedConversation(input_ids, labels)


def tokenize_question(
    conversation: Conversation | Mapping[str, Any],
    tokenizer: Any,
    *,
    prompt: PromptFormat,
    num_image_tokens: int | Sequence[int],
) -> list[int]:
    """Return the tokens up to where the model must answer: the last human turn, then its cue.

    Raises:
        ConfigError: as ``tokenize_conversation``.
    """
    if not isinstance(conversation, Conversation):
        conversation = parse_conversation(conversation, "the conversation")
    tokens, _ = _encode(render_question(conversation, tokenizer, prompt), tokenizer)
    image_id = _require_images(conversation, tokens, tokenizer)
    expanded: list[int] = []
    for token, copies in zip(tokens, _copies(tokens, image_id, num_image_tokens), strict=True):
        expanded += [token] * copies
    return expanded


def _encode(rendered: Prompt, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of a text and each one's range of characters; ``<s>`` has an empty one."""
    try:
        encoded = tokenizer(
            rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    except Exception as error:  # tokenizers, which is Rust, raises plain exceptions
        raise ConfigError(
            f"the tokenizer {shorten(tokenizer.name_or_path)} fails at a text: {shorten(error)}; "
            "expected tokens. Restore its tokenizer.json."
        ) from None
    begin = [] if rendered.has_special_tokens else _begin(tokenizer)
    return begin + encoded["input_ids"], [(0, 0)] * len(begin) + encoded["offset_mapping"]


def _begin(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts in front of a text: ``<s>``, or none."""
    of_nothing = tokenizer("")["input_ids"]
    starts = tokenizer.bos_token_id is not None and of_nothing[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if starts else []


def _tokenize_answers(rendered: Prompt, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text, and which of them belong to answers.

    Where one token would hold the end of the last question and the start of its answer, both are
    tokenised by themselves: the model is asked with the question's tokens.
    """
    tokens, offsets = _encode(rendered, tokenizer)
    cut = rendered.answers[-1][0] if rendered.answers else 0
    if any(start < cut < end for start, end in offsets):
        question = Prompt(rendered.text[:cut], [], rendered.has_special_tokens)
        tokens, offsets = _encode(question, tokenizer)
        more, ranges = _encode_behind(rendered.text[cut:], tokenizer)
        tokens, offsets = tokens + more, offsets + [(cut + s, cut + e) for s, e in ranges]
    is_answer = [
        any(low <= start and end <= high for low, high in rendered.answers)
        for start, end in offsets
    ]
    num_begin = 0 if rendered.has_special_tokens else len(_begin(tokenizer))
    is_answer[:num_begin] = [False] * num_begin
    return tokens, is_answer


def _encode_behind(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return tokens and ranges of a text as it stands behind other text: no blank is put before it.

    Raises:
        ConfigError: the tokenizer joins it with whatever stands before.
    """
    for before in (tokenizer.eos_token or "", "\n", ":", "."):
        ids, offsets = _encode(Prompt(before + text, [], True), tokenizer)
        of_before, _ = _encode(Prompt(before, [], True), tokenizer)
        n = len(of_before)
        is_apart = ids[:n] == of_before and all(start >= len(before) for start, _ in offsets[n:])
        if before and is_apart and tokenizer.decode(ids).startswith(before + text[:1]):
            shifted = [(start - len(before), end - len(before)) for start, end in offsets[n:]]
            return ids[n:], shifted
    raise ConfigError(
        f"the tokenizer joins the answer {text[:40]!r} with what stands before it, so that its "
        "first token cannot be learned; use student.prompt: v1, or another chat template."
    )


def _without_rest(
    tokens: list[int], is_answer: list[bool], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Leave out what follows the last answer, unless it holds an image."""
    if True not in is_answer:
        return tokens, is_answer
    end = len(is_answer) - is_answer[::-1].index(True)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in tokens[end:]:
        return tokens, is_answer
    return tokens[:end], is_answer[:end]


def _count_as_llava(
    text: str,
    tokens: list[int],
    tokenizer: Any,
    max_length: int | None,
    cut_at: int | None,
) -> list[bool] | None:
    """Return which tokens LLaVA labels in Vicuna's chat; None for tokenizers other than Llama's.

    LLaVA finds answers by counting: it cuts the text at ``</s>``, tokenises each round and its
    question by themselves, and adds up. Where the sum is not the number of tokens, nothing is
    labelled; its counts are also wrong where ``<unk>``, which it pads with, is in the text. LLaVA
    does not compare samples longer than ``max_length``. Without an image it cuts the tokens at
    ``cut_at`` before it counts them.

    Source: haotian-liu/LLaVA llava/train/train.py, preprocess_v1.
    """
    legacy = tokenizer.init_kwargs.get("legacy")
    if legacy is None or not _begin(tokenizer):
        return None

    def count(part: str) -> int:
        return len(_encode(Prompt(part, []), tokenizer)[0])

    # a round by itself starts with <s>, and one more token unless `legacy`
    extra = 0 if legacy else 1
    is_answer = [False] * len(tokens)
    position = 1
    for number, part in enumerate(text.split(turn_end(tokenizer))):
        question, cue, answer = part.partition(" ASSISTANT: ")
        if not part or not cue or cue in answer:
            break
        num_all, num_question = count(part), count(question + cue) - 2
        if number:
            num_all, num_question = num_all - extra, num_question - extra
        for at in range(position + num_question, min(position + num_all, len(tokens))):
            is_answer[at] = True
        position += num_all
    padding = tokenizer.unk_token_id
    num_tokens = sum(token != padding for token in tokens[:cut_at])
    is_compared = max_length is None or position < max_length
    return [False] * len(tokens) if is_compared and position != num_tokens else is_answer


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
    """Return the id of ``<image>``, after checking that the tokens hold one per image."""
    image_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    require_image_count(conversation, tokens.count(image_id))
    return image_id
