"""Load the tokenizer of a language model so that it gives LLaVA's tokens, ``<image>`` included.

Input: a hub id or directory. Output: a fast tokenizer of transformers. Used by training,
evaluation, ``ask``, import and export: all of them get their tokens from what is loaded here.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from movekd.errors import ConfigError, WeightsError
from movekd.student.hf_loading import loading
from movekd.student.sentencepiece_tokenizer import (
    SentencePieceModel,
    convert_sentencepiece,
    read_sentencepiece,
    require_sentencepiece_tokens,
    start_pieces_with_blank,
)
from movekd.student.tensor_files import read_json

IMAGE_TOKEN = "<image>"
"""Placeholder of an image in a text; one token of the vocabulary."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja"),
)
"""Files that a Llama's tokenizer may consist of."""

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
"""A directory with a tokenizer holds one of these files."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_LLAMA_MODELS = (None, "llama", "mistral", "llava_llama", "move_llava_llama")
"""Model types whose `tokenizer.model` is a Llama's, if no file names the tokenizer's class."""


def load_tokenizer(
    source: str | Path, model_config: Any = None, key: str = "the tokenizer of"
) -> Any:
    """Return a language model's tokenizer, as training, evaluation and exports use it.

    A Llama's `tokenizer.model` is read as LLaVA reads it (slow tokenizer; default of `legacy`:
    true). ``<image>`` and a padding token are added where they are missing.

    Args:
        source: hub id or directory with `tokenizer.model` or `tokenizer.json`.
        model_config: the language model's config, where ``source`` has one that transformers does
            not know.
        key: the name of ``source`` in an error.

    Raises:
        WeightsError: the tokenizer is missing or cannot be read, or its conversion cuts texts
            otherwise than sentencepiece does.
        ConfigError: the tokenizer gives no character offsets.
    """
    source = str(source)
    with loading(source, key):
        if Path(source).is_dir() and not any(_find_file(source, name) for name in _VOCABULARIES):
            # transformers would make one of four tokens
            raise WeightsError(
                f"{source} holds no tokenizer; expected a tokenizer.json or a tokenizer.model. "
                "Name one that holds it; `movekd import` takes --tokenizer."
            )
        keys = get_tokenizer_config(source, trust_remote_code=False)
        is_llama = _is_llama(source, keys, model_config)
        model_file = _find_file(source, "tokenizer.model")
        if not is_llama and _find_file(source, "tokenizer.json") is not None:
            model_file = None  # the tokenizer comes from the other file
        model = None if model_file is None else read_sentencepiece(model_file)
        tokenizer = _load_llama(source, keys, model) if is_llama else None
        if tokenizer is None:
            known = {} if model_config is None else {"config": model_config}
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **known)
        # inside of `loading`: a tokenizer of another's making may fail at its first use
        if not tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets; expected a "
                "fast tokenizer (a tokenizer.json beside the language model)."
            )
        if model is not None:
            require_sentencepiece_tokens(tokenizer, model, source)
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def forget_calls(tokenizer: Any) -> Any:
    """Return a tokenizer that is saved as it was loaded, whatever it has tokenised since.

    tokenizers keeps padding and truncation of the last call, and writes them to tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    return tokenizer


def copy_tokenizer_files(source: str, directory: Path) -> None:
    """Copy the original files of a tokenizer, without ``<image>``.

    The released code reads `tokenizer.model`, which a saved fast tokenizer does not have.
    """
    for name in TOKENIZER_FILES:
        path = _find_file(source, name)
        if path is not None:
            shutil.copyfile(path, directory / name)


def _is_llama(source: str, keys: dict[str, Any], model_config: Any) -> bool:
    """Return whether the tokenizer is a Llama's, which LLaVA reads in its own way."""
    declared = keys.get("tokenizer_class")
    if declared is not None:
        return str(declared).removesuffix("Fast") == "LlamaTokenizer"
    if model_config is not None:
        return model_config.model_type in _LLAMA_MODELS
    path = _find_file(source, "config.json")
    if path is None:
        return _find_file(source, "tokenizer.model") is not None
    return read_json(path).get("model_type") in _LLAMA_MODELS


def _load_llama(source: str, keys: dict[str, Any], model: SentencePieceModel | None) -> Any:
    """Return a Llama's tokenizer; None where its `tokenizer.model` is of another kind."""
    if model is None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
        legacy = start_pieces_with_blank(tokenizer.backend_tokenizer, tokenizer.all_special_tokens)
        tokenizer.init_kwargs["legacy"] = legacy
        return tokenizer
    is_legacy = bool(keys.get("legacy", True))
    stock = LlamaTokenizer.from_pretrained(source)  # knows every key of tokenizer_config.json
    core = convert_sentencepiece(
        model, is_legacy, stock.all_special_tokens, stock.added_tokens_decoder
    )
    if core is None:
        return None
    for number, token in keys.get("added_tokens_decoder", {}).items():
        if core.token_to_id(token["content"]) != int(number):
            raise WeightsError(
                f"tokenizer_config.json of {source} says that token '{token['content']}' has the "
                f"number {number}; behind the {core.get_vocab_size(with_added_tokens=False)} of "
                f"tokenizer.model it gets {core.token_to_id(token['content'])}. Correct "
                "added_tokens_decoder there."
            )
    if not keys.get("add_bos_token", True):
        core.post_processor = None
    named = {name: getattr(stock, name) for name in _NAMED_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{name: token for name, token in named.items() if token is not None},
        extra_special_tokens=[t for t in stock.all_special_tokens if t not in named.values()],
        chat_template=stock.chat_template,
        model_max_length=stock.model_max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        legacy=is_legacy,
    )


def _find_file(source: str, name: str) -> Path | None:
    """Return where a file of a directory or a hub repository lies; None if it has none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)
