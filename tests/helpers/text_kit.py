"""Tokenizers of several language models, and LLaVA's tokens of 54 conversations."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llava_text"
"""What LLaVA makes of 54 conversations, and Mistral's tokenizer.model; README.md there."""

LLAVA_NAMES: dict[str, bool | None] = {"mistral_legacy_false": False, "mistral_no_legacy_key": None}
"""Name of LLaVA's answers -> `legacy` of the tokenizer_config.json that it read."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The turns of Qwen and SmolLM."""
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{%- generation %}"
    "{{ ' ' + m['content'] + eos_token }}{%- endgeneration %}{% endif %}{% endfor %}"
)
"""The turns of Llama 2 and Mistral."""
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' }}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
"""A question that ends with a blank: Llama's tokens join it with the answer's first word."""


def unmarked(template: str) -> str:
    """Return a chat template without its generation marks."""
    return re.sub(r"{%-? (end)?generation %}", "", template)


def llava_conversations(prompt: str) -> list[dict[str, Any]]:
    """Return the conversations of the fixture for a prompt format, in LLaVA's JSON form."""
    text = (FIXTURE / f"conversations_{prompt}.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def llava_tokens(name: str, prompt: str, conversation_id: str) -> dict[str, Any]:
    """Return LLaVA's input_ids and labels of a conversation."""
    tokens = json.loads((FIXTURE / "tokens.json").read_text(encoding="utf-8"))
    return dict(tokens[name][f"{prompt}/{conversation_id}"])


def write_mistral(folder: Path, legacy: bool | None = False, **keys: Any) -> Path:
    """Write a tokenizer as Vicuna ships it, a tokenizer.model without tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FIXTURE / "tokenizer.model", folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", **keys}
    if legacy is not None:
        config["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_bpe(
    special_tokens: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **keys: Any
) -> Any:
    """Return a byte-level BPE tokenizer that cuts words as Qwen does, trained on the fixture.

    ``keys`` are those of a tokenizer_config.json. Default: Qwen's.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    conversations = llava_conversations("v1")
    texts = [turn["value"] for c in conversations for turn in c["conversations"]]
    tokenizer.train_from_iterator(texts, trainer)
    of_qwen = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": ["<|im_start|>"],
        "chat_template": CHATML,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(keys or of_qwen))
