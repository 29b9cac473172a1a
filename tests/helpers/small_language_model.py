"""Small random language models of the published kinds, each with a tokenizer and a chat template.

Two tokenizers are real: Mistral's SentencePiece model and SmolLM2's BPE. The others are small BPE
tokenizers with the special tokens of the model's.
"""

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import chat_templates
from text_kit import byte_bpe, write_mistral

SMOLLM2 = Path(__file__).parents[1] / "fixtures" / "smollm2_tokenizer"
"""SmolLM2's tokenizer; README.md there."""

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # so that positions and windows change the logits
}


def write_smollm2(folder: Path) -> Path:
    """Write SmolLM2's tokenizer as a folder that transformers loads."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = (SMOLLM2 / "tokenizer.json.xz").read_bytes()
    (folder / "tokenizer.json").write_bytes(lzma.decompress(packed))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((SMOLLM2 / name).read_bytes())
    return folder


def _write_llama2(folder: Path) -> None:
    write_mistral(folder, False, chat_template=chat_templates.LLAMA2)


def _write_mistral(folder: Path) -> None:
    write_mistral(folder, False, chat_template=chat_templates.MISTRAL)


def _write_smollm2(folder: Path) -> None:
    write_smollm2(folder)


def _write_llama3(folder: Path) -> None:
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id")
    byte_bpe(
        tuple(f"<|{name}|>" for name in names),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=chat_templates.LLAMA3,
    ).save_pretrained(folder)


def _write_qwen3(folder: Path) -> None:
    tokenizer = byte_bpe(
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=chat_templates.QWEN3,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)


def _write_gemma3(folder: Path) -> None:
    byte_bpe(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=chat_templates.GEMMA3,
    ).save_pretrained(folder)


def _write_smollm3(folder: Path) -> None:
    tokenizer = byte_bpe(
        ("<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_templates.SMOLLM3,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Kind:
    """A kind of language model.

    Attributes:
        model: its stock class.
        config: its stock config.
        write_tokenizer: writes the tokenizer into a folder.
        stops: the tokens that end an answer.
        keys: of the config, beside ``SIZES``.
        generation: of generation_config.json; ``eos`` names tokens.
        spare_rows: rows of the vocabulary that no token has, as Qwen's has some.
    """

    model: Any
    config: Any
    write_tokenizer: Callable[[Path], None]
    stops: tuple[str, ...]
    keys: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    spare_rows: int = 0


KINDS: dict[str, Kind] = {
    "llama2": Kind(LlamaForCausalLM, LlamaConfig, _write_llama2, ("</s>",)),
    "mistral": Kind(
        MistralForCausalLM, MistralConfig, _write_mistral, ("</s>",), {"sliding_window": 16}
    ),
    "smollm2": Kind(
        LlamaForCausalLM,
        LlamaConfig,
        _write_smollm2,
        ("<|im_end|>",),
        {"tie_word_embeddings": True, "pad_token_id": 2, "rope_theta": 100_000},
    ),
    "llama3": Kind(
        LlamaForCausalLM,
        LlamaConfig,
        _write_llama3,
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        {
            "tie_word_embeddings": True,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
            "eos": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        },
    ),
    "qwen3": Kind(
        Qwen3ForCausalLM,
        Qwen3Config,
        _write_qwen3,
        ("<|im_end|>", "<|endoftext|>"),
        {"tie_word_embeddings": True, "head_dim": 16},
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "eos": ("<|im_end|>", "<|endoftext|>"),
        },
        spare_rows=5,
    ),
    "gemma3": Kind(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        _write_gemma3,
        ("<eos>", "<end_of_turn>"),
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {
            "do_sample": True,
            "top_k": 64,
            "top_p": 0.95,
            "repetition_penalty": 1.3,
            "cache_implementation": "hybrid",
            "eos": ("<eos>",),
        },
    ),
    "smollm3": Kind(
        SmolLM3ForCausalLM,
        SmolLM3Config,
        _write_smollm3,
        ("<|im_end|>",),
        {"no_rope_layer_interval": 2},
    ),
}
"""Name -> kind. Llama 3, Qwen3 (small ones), Gemma 3 and SmolLM tie their embeddings."""


def write_language_model(name: str, folder: Path) -> Path:
    """Write a small language model with random weights, its tokenizer and its settings."""
    kind = KINDS[name]
    kind.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {
        f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("bos", "eos", "pad")
    }
    torch.manual_seed(11)
    size = len(tokenizer) + kind.spare_rows
    model = kind.model(kind.config(**(SIZES | ids | kind.keys), vocab_size=size))
    model.save_pretrained(folder)
    settings = {key: value for key, value in kind.generation.items() if key != "eos"}
    if "eos" in kind.generation:
        settings["eos_token_id"] = tokenizer.convert_tokens_to_ids(list(kind.generation["eos"]))
    else:
        settings["eos_token_id"] = tokenizer.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
