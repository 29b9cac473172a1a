"""Settle how answers are generated: where they stop, and greedily.

Input: a language model's generation settings, its tokenizer and the prompt format. Output: the
tokens that end an answer, and the settings of an export. ``evaluate.generate`` stops at the same
tokens, so an export's own ``generate`` gives the answers of `movekd ask`.
"""

from typing import Any

from transformers import GenerationConfig

from movekd.corpus.conversations import Conversation
from movekd.student.config import PromptFormat
from movekd.student.template_answers import special_tokens
from movekd.student.tokenization import tokenize_conversation


def stop_tokens(tokenizer: Any, generation_config: Any, prompt: PromptFormat) -> list[int]:
    """Return the ids of the tokens that end an answer, without repeats.

    These are the tokenizer's ``eos_token``, those of the language model (Llama 3 has three), and
    with prompt ``chat_template`` the token that the template writes behind an answer: Gemma's is
    ``<end_of_turn>``, while its ``eos_token`` is another.

    Raises:
        ConfigError: the tokenizer's chat template fails.
    """
    of_model = generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    if prompt == "chat_template":
        found.append(_end_of_turn(tokenizer))
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def export_settings(tokenizer: Any, generation_config: Any, prompt: PromptFormat) -> Any:
    """Return the GenerationConfig of an export: greedy, with the student's stop tokens.

    No other setting of the base is kept: `movekd ask` and `evaluate` follow none of them, and the
    student was neither trained nor scored with its sampling, penalties or beams.

    Raises:
        ConfigError: the tokenizer's chat template fails.
    """
    stops = stop_tokens(tokenizer, generation_config, prompt)
    return GenerationConfig(
        bos_token_id=generation_config.bos_token_id,
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token that ends an answer in the chat template; None if it has none."""
    turns: Any = (("human", "Which one?"), ("gpt", "This one."))
    sample = tokenize_conversation(
        Conversation("end of turn", (), turns),
        tokenizer,
        prompt="chat_template",
        num_image_tokens=1,
        recipe="revised",
    )
    last: int = sample.input_ids[-1]
    return last if tokenizer.convert_ids_to_tokens(last) in special_tokens(tokenizer) else None
